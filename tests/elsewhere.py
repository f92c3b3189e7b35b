"""A device that is not there: computes on the CPU, calls itself another device, and refuses to mix with the CPU.

It runs code of eager mode and of TorchScript with true values, so that a tensor left behind on the CPU, or made there,
is found without a second device. What it cannot show: that a real device has the operators and rounds alike.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map

ELSEWHERE = torch.device("mtia", 0)
"""A type that no operator asks for by name: torch's LSTM takes an xpu's own code before it is dispatched."""

MIXING = ("aten::_to_copy", "aten::copy_", "aten::index.Tensor", "aten::index_put_", "aten::index_put")
"""Operators that take the CPU's tensors beside another device's: copies, and indices."""


class ElsewhereTensor(Tensor):
    """A tensor on `ELSEWHERE`; `inner` holds its values on the CPU."""

    @staticmethod
    def __new__(cls, inner: Tensor) -> ElsewhereTensor:
        return Tensor._make_wrapper_subclass(
            cls, inner.shape, strides=inner.stride(), dtype=inner.dtype, device=ELSEWHERE, layout=inner.layout
        )

    def __init__(self, inner: Tensor) -> None:
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(f"{func.name()}: tensors elsewhere need `with Elsewhere():`")


class Elsewhere(TorchDispatchMode):
    """While it is active, `device=ELSEWHERE` makes such tensors, and mixing with the CPU is an error.

    Attributes:
        mixed: operators that mixed.
    """

    def __init__(self) -> None:
        super().__init__()
        self.mixed: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        leaves = tree_flatten((args, kwargs))[0]
        there = [leaf for leaf in leaves if isinstance(leaf, ElsewhereTensor)]
        here = [leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, ElsewhereTensor)]
        if there and any(leaf.dim() > 0 for leaf in here) and not func.name().startswith(MIXING):
            self.mixed.append(func.name())
            raise RuntimeError(f"{func.name()}: expected all tensors on one device, found {ELSEWHERE} and cpu")
        result = func(*tree_map(_here, args), **tree_map(_here, kwargs))
        if any(result is leaf.inner for leaf in there):
            return next(leaf for leaf in there if result is leaf.inner)  # it was changed in place
        device = kwargs.get("device")
        away = bool(there) if device is None else torch.device(device).type == ELSEWHERE.type
        return send(result) if away else result


def send(value: Any) -> Any:
    """Tensors within `value`, moved elsewhere."""
    return tree_map(lambda leaf: ElsewhereTensor(leaf) if isinstance(leaf, Tensor) else leaf, value)


def fetch(value: Any) -> Any:
    """Tensors within `value` as the CPU's; AssertionError where one has not been elsewhere."""

    def one(leaf: Any) -> Any:
        assert not isinstance(leaf, Tensor) or isinstance(leaf, ElsewhereTensor), "this tensor is on the CPU"
        return leaf.inner if isinstance(leaf, ElsewhereTensor) else leaf

    return tree_map(one, value)


def _here(leaf: Any) -> Any:
    if isinstance(leaf, ElsewhereTensor):
        return leaf.inner
    return torch.device("cpu") if isinstance(leaf, torch.device) else leaf
