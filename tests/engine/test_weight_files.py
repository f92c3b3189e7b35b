"""Files of weights are read safely: strangers' code does not run, damage is told in one line."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mtl_rcnn.engine.pretrained.safe_pickle import load_pickle
from mtl_rcnn.engine.pretrained.weight_file import read_weight_file
from mtl_rcnn.errors import CheckpointError


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_strangers_file_runs_no_code(tmp_path: Path, suffix: str) -> None:
    content = {"model": {"weight": Evil(tmp_path / "was_run")}, "__author__": "somebody"}
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(content)) if suffix == "pkl" else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"refused.*mkdir"):
        read_weight_file(str(path))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_any_pickle_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    content = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.float64(2.5), "c": [b"bytes", "text", None]}
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    found = load_pickle(path)
    assert np.array_equal(found["a"], content["a"])
    assert found["b"] == 2.5
    assert list(found["c"]) == [b"bytes", "text", None]


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", "half"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes | str) -> None:
    path = tmp_path / name
    if content == "half":
        tensors = {"layer1.0.conv1.weight": torch.zeros(100, 100)}
        if name.endswith("pkl"):
            path.write_bytes(pickle.dumps({k: v.numpy() for k, v in tensors.items()}))
        elif name.endswith("pth"):
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.\w+.*(not a readable|truncated)"):
        read_weight_file(str(path))


def test_files_without_weights_are_named(tmp_path: Path) -> None:
    for content, said in (([1, 2], "holds a list"), ({"epoch": 3}, "no tensors by name")):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=said):
            read_weight_file(str(tmp_path / "model.pth"))
    with pytest.raises(CheckpointError, match="a directory"):
        read_weight_file(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such file"):
        read_weight_file(str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="torchvision has no such weights"):
        read_weight_file("torchvision://ResNet18_Weights.NONE")


class Pointers:
    """A dtype that claims to hold objects: NumPy would take the array's bytes for their addresses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("V8",), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 1)


class Flagged:
    """A plain dtype whose state sets the flag of objects."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 1)


class Strings:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("O",)


@pytest.mark.parametrize("dtype", [Pointers(), Flagged(), Strings()])
def test_a_dtype_that_numpy_would_trust_is_refused(tmp_path: Path, dtype: Any) -> None:
    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild, arguments, _ = np.zeros(1).__reduce__()
            return rebuild, arguments, (1, (1,), dtype, False, b"A" * 8)

    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"weight": Array()}))
    with pytest.raises(CheckpointError, match=r"refused.*dtype"):
        load_pickle(path)
