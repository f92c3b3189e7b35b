"""Batch norms of other libraries: statistics that are implied, bookkeeping that differs, another epsilon."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_COUNTER = "num_batches_tracked"


def fit_norms(
    tensors: Mapping[str, Tensor], model: nn.Module, eps: float | None, folded: bool = False
) -> dict[str, Tensor]:
    """The tensors such that each batch norm of the network computes what the source's did.

    Args:
        tensors: by the network's names.
        eps: that the source added to the variances, None if what the network adds. The difference goes into the scale,
            which keeps channels without variance finite: w / sqrt(v + eps) = w' / sqrt(v + eps').
        folded: norms without statistics, which the source had folded into scale and shift (Caffe2), get mean 0 and
            the variance that makes them do nothing.
    """
    fitted = dict(tensors)
    for path, module in model.named_modules():
        if f"{path}.weight" not in tensors or not hasattr(module, "running_var"):
            continue
        scale = tensors[f"{path}.weight"]
        if folded:
            fitted.setdefault(f"{path}.running_mean", torch.zeros_like(scale))
            fitted.setdefault(f"{path}.running_var", torch.ones_like(scale) - module.eps)
        elif eps is not None and eps != module.eps and f"{path}.running_var" in tensors:
            fitted[f"{path}.weight"] = _rescaled(scale, tensors[f"{path}.running_var"], eps, module.eps)
        if hasattr(module, _COUNTER):
            fitted.setdefault(f"{path}.{_COUNTER}", torch.tensor(0))
        else:
            fitted.pop(f"{path}.{_COUNTER}", None)
    return fitted


def _rescaled(scale: Tensor, variance: Tensor, theirs: float, ours: float) -> Tensor:
    wide = variance.double()
    factor = torch.where(wide + theirs > 0, ((wide + ours) / (wide + theirs)).sqrt(), torch.ones_like(wide))
    return (scale.double() * factor).to(scale.dtype)
