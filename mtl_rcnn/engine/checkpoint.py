"""Checkpoints: written so that a crash never leaves half of one, read so that a stranger's file runs no code.

A checkpoint is one dict of plain values and tensors:
    format: int, version of this layout
    iteration: int, number of training steps done
    model, optimizer, schedule, scaler, balancing: their state dicts (None where there is nothing)
    ema: the average of the weights, which evaluation uses in place of `model`; None without one
    best: the best validation result so far, None before the first
    early_stop: `EarlyStop.state`, None without one
    task_schedule: `TaskSchedule.state()`, None where no task may stop early
    label_space: `LabelSpace.state()`
    config: the run's configuration as plain values
    versions: {package: version} that wrote it
No random state: batches and sampling are functions of the seed and the iteration.
"""

from __future__ import annotations

import logging
import os
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from mtl_rcnn.engine.distributed import barrier, broadcast_object, is_main
from mtl_rcnn.errors import CheckpointError, ConfigError

__all__ = ["FORMAT", "KEYS", "Checkpointer", "load", "save", "trained_weights"]

FORMAT = 1
KEYS = (
    *("format", "iteration", "model", "optimizer", "schedule", "scaler", "balancing"),
    *("best", "label_space", "config", "versions", "ema", "early_stop", "task_schedule"),
)
_LATER = ("ema", "early_stop", "task_schedule")
"""Keys that files written before there were such things lack: there they are None."""
_POINTER = "last_checkpoint"
_BEST = "model_best"
_NUMBERED = re.compile(r"model_(\d+)\.pth")
_PLAIN = (int, float, bool, str, bytes, type(None), Tensor, nn.Parameter)
_log = logging.getLogger(__name__)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically: whoever opens `path` finds the old file or the whole new one.

    Args:
        state: all of `KEYS`; `format` may be left out.

    Raises:
        CheckpointError: a missing or unknown key, or a value that `load` would refuse, named by its place.
    """
    state = {"format": FORMAT, **state}
    if set(state) != set(KEYS):
        raise CheckpointError(f"{path}: keys {sorted(set(state) ^ set(KEYS))} are missing or not part of a checkpoint")
    _check_plain(state, "")
    _write_atomically(path, lambda file: torch.save(state, file))


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that `save` wrote; tensors on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; {_advice(path)}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or archive can fail in any way
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes): not a readable checkpoint, truncated or damaged "
            f"({text.rstrip('.')}); {_advice(path)}"
        ) from error
    _check_layout(path, state)
    return {**dict.fromkeys(_LATER), **state}


def trained_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a loaded checkpoint that evaluation used: the average where there is one."""
    return state["model"] if state["ema"] is None else state["ema"]


class Checkpointer:
    """A run's checkpoints in one folder: `model_0000100.pth` ..., `model_best.pth`, `model_best_<task>.pth`,
    `last_checkpoint`.

    Every rank calls every method; rank 0 works and the others wait for it.

    Args:
        folder: where they lie; made if missing.
        keep: how many of the newest numbered checkpoints stay, at least 1; the best one always does.
    """

    def __init__(self, folder: Path, keep: int) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep: expected a number >= 1, got {keep}")
        self.folder = Path(folder)
        self.keep = keep
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)

    def save(self, iteration: int, state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint after `iteration` steps, points to it, and removes old ones."""
        path = self.folder / f"model_{iteration:07d}.pth"
        if is_main():
            save(path, state)
            _write_atomically(self.folder / _POINTER, lambda file: file.write(path.name.encode()))
            self._prune(iteration)
        barrier()
        return path

    def save_best(self, state: Mapping[str, Any], best: Any, task: str | None = None) -> Path:
        """Writes `model_best.pth`, or the best network of a task, `model_best_<task>.pth`: `state` with `best` (plain
        values) as its best result."""
        path = self.folder / (f"{_BEST}.pth" if task is None else f"{_BEST}_{task}.pth")
        if is_main():
            save(path, {**state, "best": best})
        barrier()
        return path

    def latest(self) -> Path | None:
        """The checkpoint to resume from, None if there is none; the same on every rank.

        It is what `last_checkpoint` names or, with a warning if that is gone, the newest whole one by its number.
        """
        return broadcast_object(self._latest() if is_main() else None)

    def _latest(self) -> Path | None:
        pointer = self.folder / _POINTER
        name = pointer.read_text().strip() if pointer.is_file() else ""
        if name and (self.folder / name).is_file():
            return self.folder / name
        found = [path for path in _numbered(self.folder) if zipfile.is_zipfile(path)]
        if name or found:
            _log.warning(
                "%s %s; resuming from %s",
                pointer,
                f"names {name}, which is missing" if name else "is missing or empty",
                found[-1].name if found else "nothing",
            )
        return found[-1] if found else None

    def _prune(self, iteration: int) -> None:
        # Later ones than the one just written belong to another course of the run: not ours to remove.
        earlier = [path for path in _numbered(self.folder) if _number(path) <= iteration]
        for path in [*earlier[: -self.keep], *self.folder.glob(".*.pth.tmp")]:
            path.unlink()


def _check_plain(value: Any, place: str) -> None:
    if type(value) in (dict, OrderedDict):
        for key, item in value.items():
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"checkpoint value {place}: key {key!r} is a {type(key).__name__}, expected str or int"
                )
            _check_plain(item, f"{place}.{key}" if place else str(key))
    elif type(value) in (list, tuple):
        for index, item in enumerate(value):
            _check_plain(item, f"{place}[{index}]")
    elif type(value) not in _PLAIN:
        raise CheckpointError(
            f"checkpoint value {place} is a {type(value).__module__}.{type(value).__qualname__}; "
            "expected tensors and plain Python numbers, strings, lists and dicts"
        )


def _check_layout(path: Path, state: Any) -> None:
    found = state.get("format") if isinstance(state, dict) else None
    if found is None:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes): not a checkpoint of mtl_rcnn (it has no 'format'); {_advice(path)}"
        )
    if found != FORMAT:
        raise CheckpointError(
            f"{path}: has format {found}, this version of mtl_rcnn reads {FORMAT}; use the one that wrote it"
        )
    wrong = (set(state) ^ set(KEYS)) - (set(_LATER) - set(state))
    if wrong:
        raise CheckpointError(f"{path}: keys {sorted(wrong)} are missing or unknown; {_advice(path)}")


def _advice(path: Path) -> str:
    """What to do without this file."""
    others = [other for other in _numbered(path.parent) if other.name != path.name and zipfile.is_zipfile(other)]
    if others:
        return f"resume from {others[-1].name} with checkpoint.resume={others[-1]}"
    return "no other checkpoint lies beside it: start anew with checkpoint.resume=false"


def _numbered(folder: Path) -> list[Path]:
    """The numbered checkpoints, oldest first."""
    found = folder.glob("model_*.pth") if folder.is_dir() else ()
    return sorted((path for path in found if _NUMBERED.fullmatch(path.name)), key=_number)


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("model_"))


def _write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` on a temporary file beside `path`, forces it to the disk, and renames it."""
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)
