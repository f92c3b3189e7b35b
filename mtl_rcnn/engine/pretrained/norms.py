"""Batch norms of other libraries: statistics that are implied, bookkeeping that differs, another epsilon."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

_COUNTER = "num_batches_tracked"


def fit_norms(tensors: Mapping[str, Tensor], model: nn.Module, eps: float) -> dict[str, Tensor]:
    """The tensors with complete statistics for the network's batch norms, so that each computes what the source's did.

    Args:
        tensors: by the network's names. Norms without statistics (Caffe2 folds them into scale and shift) get mean 0
            and the variance that makes them do nothing.
        eps: that the source added to the variances; the difference to the network's own goes into the variance.
    """
    fitted = dict(tensors)
    for path, module in model.named_modules():
        if f"{path}.weight" in tensors and hasattr(module, "running_var"):
            scale = tensors[f"{path}.weight"]
            variance = fitted.get(f"{path}.running_var", torch.ones_like(scale) - eps)
            fitted[f"{path}.running_var"] = variance + (eps - module.eps) if eps != module.eps else variance
            fitted.setdefault(f"{path}.running_mean", torch.zeros_like(scale))
            if hasattr(module, _COUNTER):
                fitted.setdefault(f"{path}.{_COUNTER}", torch.tensor(0))
            else:
                fitted.pop(f"{path}.{_COUNTER}", None)
    return fitted
