"""Reads the pickles in which Detectron2's model zoo comes, and runs no code from them."""

from __future__ import annotations

import pickle
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from mtl_rcnn.errors import CheckpointError


def load_pickle(path: Path) -> Any:
    """What a pickle holds, as long as that is NumPy arrays and plain Python values.

    Args:
        path: a pickle of any protocol; Python 2's strings are read as latin-1.

    Raises:
        CheckpointError: the pickle names anything else, whose code would run if it were loaded, or is damaged.
    """
    with open(path, "rb") as file:
        try:
            return _ArraysOnly(file, encoding="latin1").load()
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


def _latin1(text: str, encoding: str) -> bytes:
    """What `_codecs.encode` does for the bytes of arrays in protocol 2."""
    if encoding != "latin1":
        raise _ForeignCode(f"the text encoding {encoding!r}")
    return text.encode("latin1")


def _array_builders() -> dict[tuple[str, str], Callable[..., Any]]:
    """By (module, name): the few callables of which NumPy's arrays, scalars and dtypes are put together."""
    rebuild, scalar = np.zeros(1).__reduce__()[0], np.float32(0).__reduce__()[0]
    from_buffer = np.zeros(1).__reduce_ex__(5)[0]
    found: dict[tuple[str, str], Callable[..., Any]] = {
        ("collections", "OrderedDict"): OrderedDict,
        ("numpy", "ndarray"): np.ndarray,
        ("numpy", "dtype"): np.dtype,
        ("_codecs", "encode"): _latin1,
    }
    for core in ("numpy.core", "numpy._core"):  # before and since NumPy 2
        found[f"{core}.multiarray", "_reconstruct"] = rebuild
        found[f"{core}.multiarray", "scalar"] = scalar
        found[f"{core}.numeric", "_frombuffer"] = from_buffer
    return found


_BUILDERS = _array_builders()


class _ArraysOnly(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in _BUILDERS:
            raise _ForeignCode(f"{module}.{name}")
        return _BUILDERS[module, name]
