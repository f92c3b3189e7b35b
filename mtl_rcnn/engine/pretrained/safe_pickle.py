"""Reads the pickles in which Detectron2's model zoo comes, and runs no code from them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mtl_rcnn.errors import CheckpointError

_DEPTH = 20


def load_pickle(path: Path) -> Any:
    """What a pickle holds, as long as that is NumPy arrays and plain Python values.

    Args:
        path: a pickle of any protocol; Python 2's strings are read as latin-1.

    Raises:
        CheckpointError: the pickle names anything else, whose code would run if it were loaded, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _unwrapped(_ArraysOnly(file, encoding="latin1").load())
        except _ForeignCode as error:
            raise CheckpointError(
                f"{path}: refused. It asks for {error}, and whatever a pickle asks for is run. Weights need NumPy "
                "arrays and plain values alone; save those, or a state dict with torch.save"
            ) from error
        except Exception as error:  # a damaged pickle can fail in any way
            text = str(error).splitlines()[0] if str(error) else type(error).__name__
            raise CheckpointError(
                f"{path} ({path.stat().st_size} bytes): not a readable pickle, truncated or damaged "
                f"({text.rstrip('.')}); fetch it again"
            ) from error


class _ForeignCode(Exception):
    """A pickle names a function or class that is not needed to rebuild arrays."""


# NumPy's own reconstruction trusts what a pickle says of dtypes and flags: a crafted one makes it follow the file's
# bytes as pointers. So the unpickler builds none of its objects; these stand for them and check every word.


@dataclass
class _Dtype:
    """A dtype of numbers, to which BUILD may tell the byte order and nothing else."""

    value: np.dtype

    def __setstate__(self, state: Any) -> None:
        _, order, *rest = state
        if order not in ("<", ">", "=", "|") or list(rest[:6]) != [None, None, None, -1, -1, 0]:
            raise _ForeignCode(f"the dtype state {str(state)[:60]}")
        self.value = self.value.newbyteorder(order)


@dataclass
class _Array:
    """An array that BUILD fills."""

    value: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        _, shape, dtype, fortran, raw = state
        self.value = _from_bytes(raw, dtype, shape, "F" if fortran else "C")


def _dtype(code: Any, *_: Any) -> _Dtype:
    value = np.dtype(str(code))
    if value.kind not in "biufc" or value.fields is not None or value.subdtype is not None:
        raise _ForeignCode(f"the dtype {code!r}, which is no number")
    return _Dtype(value)


def _reconstruct(*_: Any) -> _Array:
    return _Array()


def _scalar(dtype: _Dtype, raw: bytes | str) -> Any:
    return _from_bytes(raw, dtype, (1,), "C")[0]


def _from_buffer(raw: Any, dtype: _Dtype, shape: Any, order: str, axes: Any = None) -> _Array:
    if order == "K" and axes is not None:
        return _Array(_from_bytes(raw, dtype, shape, "C").transpose(axes))
    return _Array(_from_bytes(raw, dtype, shape, order))


def _from_bytes(raw: Any, dtype: _Dtype, shape: Any, order: str) -> np.ndarray:
    raw = raw.encode("latin1") if isinstance(raw, str) else bytes(raw)
    return np.frombuffer(raw, dtype.value).reshape(shape, order=order)


def _latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does for the bytes of arrays in protocol 2."""
    if encoding != "latin1":
        raise _ForeignCode(f"the text encoding {encoding!r}")
    return text.encode("latin1")


_CORES = ("numpy.core", "numpy._core")  # before and since NumPy 2
_BUILDERS: dict[tuple[str, str], Any] = {
    ("collections", "OrderedDict"): OrderedDict,
    ("numpy", "ndarray"): "an argument of _reconstruct, and no more than that",
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _latin1,
    **{(f"{core}.multiarray", "_reconstruct"): _reconstruct for core in _CORES},
    **{(f"{core}.multiarray", "scalar"): _scalar for core in _CORES},
    **{(f"{core}.numeric", "_frombuffer"): _from_buffer for core in _CORES},
}
"""By (module, name): all that a pickle of arrays needs. Functions, not our classes: a pickle can set attributes."""


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILDERS:
            raise _ForeignCode(f"{module}.{name}")
        return _BUILDERS[module, name]


def _unwrapped(content: Any, depth: int = 0) -> Any:
    """The content with real arrays in the places of their stand-ins."""
    if depth > _DEPTH:
        raise ValueError(f"containers inside one another more than {_DEPTH} deep")
    if isinstance(content, _Array):
        if content.value is None:
            raise ValueError("an array without content")
        return content.value
    if isinstance(content, dict):
        return {key: _unwrapped(value, depth + 1) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(_unwrapped(value, depth + 1) for value in content)
    return content
