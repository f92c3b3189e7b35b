"""A trained network without what only its training needs: its weights as safetensors, and in the file's metadata what
rebuilds the network around them.

The tensors have the names of the network's state dict. The metadata has one entry, `mtl_rcnn`, the text of a JSON
object (one, since safetensors writes several in any order, and equal networks shall give equal files):
    format: int, version of this layout
    iteration, label_space, config, versions: as in a checkpoint
    crc32: of the other entries, and of the tensors' names and bytes. safetensors has no checksum of its own
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from safetensors.torch import save as serialized
from torch import Tensor

from mtl_rcnn.engine.atomic import cannot_write, write_atomically
from mtl_rcnn.errors import CheckpointError

__all__ = ["DESCRIPTION", "FORMAT", "SUFFIX", "describes_itself", "load", "read_tensors", "save"]

FORMAT = 1
SUFFIX = ".safetensors"
DESCRIPTION = ("iteration", "label_space", "config", "versions")
"""What is told of the network: parts of a checkpoint, as plain JSON values."""
_ENTRY = "mtl_rcnn"


def save(path: Path, weights: Mapping[str, Tensor], description: Mapping[str, Any]) -> None:
    """Writes the file atomically: whoever opens `path` finds the old file or the whole new one.

    Args:
        weights: of any device and layout; tensors that share memory are written in full each.
        description: all of `DESCRIPTION`.

    Raises:
        CheckpointError: the disk does not take the file: `path` is as it was.
    """
    # safetensors refuses tensors that share memory or are not contiguous.
    tensors = {
        name: value.detach().cpu().clone(memory_format=torch.contiguous_format) for name, value in weights.items()
    }
    told = {"format": FORMAT, **{key: description[key] for key in DESCRIPTION}}
    content = serialized(tensors, {_ENTRY: json.dumps({**told, "crc32": _checksum(told, tensors)})})
    try:
        write_atomically(path, lambda file: file.write(content))
    except OSError as error:
        raise CheckpointError(f"{path}: {cannot_write(path, error, len(content))}") from error


def load(path: Path) -> dict[str, Any]:
    """Reads what `save` wrote, as a checkpoint that has nothing of its training: `DESCRIPTION`, `model`, and None as
    `ema`. Tensors on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, of another format, or somebody else's.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    text = _description(path)
    if text is None:
        raise CheckpointError(
            f"{path}: not a network of mtl_rcnn (its metadata has no '{_ENTRY}', which would say how to rebuild it); "
            f"weights of others may start a training: checkpoint.weights={path}"
        )
    told = _parsed(path, text)
    tensors = read_tensors(path)
    if told.pop("crc32", None) != _checksum(told, tensors):
        raise CheckpointError(f"{path} ({path.stat().st_size} bytes): damaged (its checksum is wrong); export it again")
    return {**{key: told[key] for key in DESCRIPTION}, "model": tensors, "ema": None}


def describes_itself(path: Path) -> bool:
    """Whether a safetensors file, of any author, says that it is one of `save`.

    Raises:
        CheckpointError: not a readable safetensors file.
    """
    return _description(path) is not None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a safetensors file of any author, on the CPU.

    Raises:
        CheckpointError: not a readable safetensors file.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _description(path: Path) -> str | None:
    try:
        with safe_open(path, "pt") as file:
            return (file.metadata() or {}).get(_ENTRY)
    except (SafetensorError, OSError) as error:
        raise _unreadable(path, error) from error


def _parsed(path: Path, text: str) -> dict[str, Any]:
    try:
        told = json.loads(text)
        found = told["format"]
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{path}: damaged (its '{_ENTRY}' is no description of a network)") from error
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: has format {found}, this version of mtl_rcnn reads {FORMAT}; use the one that wrote it"
        )
    return told


def _checksum(told: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> int:
    found = zlib.crc32(json.dumps(told).encode())
    for name in sorted(tensors):
        found = zlib.crc32(name.encode(), found)
        found = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), found)
    return found


def _unreadable(path: Path, error: Exception) -> CheckpointError:
    return CheckpointError(
        f"{path} ({path.stat().st_size} bytes): not a readable safetensors file, truncated or damaged "
        f"({str(error).rstrip('.')}); fetch it again"
    )
