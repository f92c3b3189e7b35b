"""Checkpoints: written so that a crash never leaves half of one, read so that a stranger's file runs no code.

A checkpoint is one dict of plain values and tensors:
    format: int, version of this layout
    iteration: int, number of training steps done
    model, optimizer, schedule, scaler, balancing: their state dicts (None where there is nothing)
    ema: the average of the weights, which evaluation uses in place of `model`; None without one
    best: the best validation result so far, None before the first
    early_stop: `EarlyStop.state`, None without one
    task_schedule: `TaskSchedule.state()`, None where no task may stop early
    evaluation_due: whether the iteration is still to be evaluated; None without evaluation sets
    rows: of metrics.jsonl that were written before it
    label_space: `LabelSpace.state()`
    config: the run's configuration as plain values
    versions: {package: version} that wrote it
No random state: batches and sampling are functions of the seed and the iteration.

The file is a zip archive with a CRC-32 of each part. torch.load does not look at these; `load` does (docs/adr/0023).
"""

from __future__ import annotations

import logging
import re
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn.engine.atomic import cannot_write, write_atomically
from mtl_rcnn.engine.background import BackgroundWriter, snapshot
from mtl_rcnn.engine.distributed import barrier, broadcast_object, is_main
from mtl_rcnn.errors import CheckpointError, ConfigError

__all__ = ["FORMAT", "KEYS", "Checkpointer", "damage", "load", "save", "trained_weights"]

FORMAT = 1
KEYS = (
    *("format", "iteration", "model", "optimizer", "schedule", "scaler", "balancing"),
    *("best", "label_space", "config", "versions", "ema", "early_stop", "task_schedule", "evaluation_due", "rows"),
)
_LATER = ("ema", "early_stop", "task_schedule", "evaluation_due", "rows")
"""Keys that files written before there were such things lack: there they are None."""
_POINTER = "last_checkpoint"
_BEST = "model_best"
_ASIDE = ".corrupt"
_NUMBERED = re.compile(r"model_(\d+)\.pth")
_PLAIN = (int, float, bool, str, bytes, type(None), Tensor, nn.Parameter)
_log = logging.getLogger(__name__)


def save(path: Path, state: Mapping[str, Any]) -> None:
    """Writes a checkpoint atomically: whoever opens `path` finds the old file or the whole new one.

    Args:
        state: all of `KEYS`; `format` may be left out.

    Raises:
        CheckpointError: a missing or unknown key, or a value that `load` would refuse, named by its place; or the disk
            does not take the file: `path` is as it was.
    """
    state = {"format": FORMAT, **state}
    if set(state) != set(KEYS):
        raise CheckpointError(f"{path}: keys {sorted(set(state) ^ set(KEYS))} are missing or not part of a checkpoint")
    _check_plain(state, "")
    try:
        write_atomically(path, lambda file: torch.save(state, file))
    except (OSError, RuntimeError) as error:  # torch's own writer wraps the system's error
        raise CheckpointError(
            f"{path}: {cannot_write(path, _of_system(error), _size(state))}; earlier checkpoints are as they were: "
            "make room and start the same command again"
        ) from error


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint that `save` wrote; tensors on the CPU. Runs no code from the file.

    Raises:
        CheckpointError: the file is missing, truncated, damaged, or something else.
    """
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"{path}: no such checkpoint; {_advice(path)}")
    fault = damage(path)
    if fault is not None:
        raise CheckpointError(
            f"{path} ({path.stat().st_size} bytes): not a readable checkpoint, truncated or damaged "
            f"({fault}); {_advice(path)}"
        )
    state = torch.load(path, map_location="cpu", weights_only=True)
    _check_layout(path, state)
    return {**dict.fromkeys(_LATER), **state}


def damage(path: Path) -> str | None:
    """What is wrong with the bytes of a file that `save` wrote; None if every part has its checksum and `load` reads
    it."""
    try:
        with zipfile.ZipFile(path) as archive:
            part = archive.testzip()
        if part is not None:
            return f"the checksum of {part} is wrong"
        # Torch reads fields of the archive that Python does not look at. mmap: everything but the tensors' values.
        torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # a damaged archive or pickle can fail in any way
        return _first_line(error)
    return None


def trained_weights(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The weights of a loaded checkpoint that evaluation used: the average where there is one."""
    return state["model"] if state["ema"] is None else state["ema"]


class Checkpointer:
    """A run's checkpoints in one folder: `model_0000100.pth` ..., `model_best.pth`, `model_best_<task>.pth`,
    `last_checkpoint`.

    Every rank calls every method; rank 0 works and the others wait for it. As a context manager it waits, when it is
    left, for what is still being written.

    Args:
        folder: where they lie; made if missing.
        keep: how many of the newest numbered checkpoints stay, at least 1; the best one always does.
        keep_every: those whose iteration is a multiple of it stay too; None: no others.
        asynchronous: copy what is saved, and write the copy while the training goes on. One file is written at a time,
            in order. What goes wrong is told at the next `save` or when the context is left.
    """

    def __init__(self, folder: Path, keep: int, keep_every: int | None = None, asynchronous: bool = False) -> None:
        if keep < 1:
            raise ConfigError(f"checkpoint.keep: expected a number >= 1, got {keep}")
        self.folder = Path(folder)
        self.keep, self.keep_every = keep, keep_every
        self._background = BackgroundWriter() if asynchronous and is_main() else None
        if is_main():
            self.folder.mkdir(parents=True, exist_ok=True)

    @staticmethod
    def from_config(folder: Path, node: Mapping[str, Any]) -> Checkpointer:
        """Of the `checkpoint` node of a training configuration."""
        return Checkpointer(folder, node["keep"], node["keep_every"], node["asynchronous"])

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if self._background is not None:
            self._background.close(quiet=kind is not None)
        if kind is None:
            barrier()

    def keeps(self, iteration: int) -> bool:
        """Whether the checkpoint of an iteration stays for good."""
        return self.keep_every is not None and iteration % self.keep_every == 0

    def save(self, iteration: int, state: Mapping[str, Any]) -> Path:
        """Writes the checkpoint after `iteration` steps, points to it, and removes old ones.

        Raises:
            CheckpointError: see `save`; of an asynchronous one, also what went wrong with the one before.
        """
        path = self.folder / f"model_{iteration:07d}.pth"

        def write(state: Mapping[str, Any]) -> None:
            save(path, state)
            write_atomically(self.folder / _POINTER, lambda file: file.write(path.name.encode()))
            self._prune(iteration)

        self._write(write, state)
        return path

    def save_best(self, state: Mapping[str, Any], best: Any, task: str | None = None) -> Path:
        """Writes `model_best.pth`, or the best network of a task, `model_best_<task>.pth`: `state` with `best` (plain
        values) as its best result."""
        path = self.folder / (f"{_BEST}.pth" if task is None else f"{_BEST}_{task}.pth")
        self._write(partial(save, path), {**state, "best": best})
        return path

    def latest(self) -> Path | None:
        """The newest checkpoint, None if there is none; the same on every rank. Changes nothing.

        It is what `last_checkpoint` names or, with a warning if that is gone, the newest whole one by its number.
        """
        return broadcast_object(self._latest() if is_main() else None)

    def resumable(self) -> Path | None:
        """The newest checkpoint whose checksums are right, None if there is none at all; the same on every rank.

        Newer ones that are damaged are set aside, with a warning: they get the ending `.corrupt`.

        Raises:
            CheckpointError: there are checkpoints, all damaged, or there were some. They stay where they are, so that
                the run does not start from nothing the next time either.
        """
        return broadcast_object(self._resumable() if is_main() else None)

    def _write(self, write: Callable[[Mapping[str, Any]], None], state: Mapping[str, Any]) -> None:
        if self._background is not None:
            self._background.submit(partial(write, snapshot(state)))
        elif is_main():
            write(state)
        barrier()

    def _latest(self) -> Path | None:
        pointer = self.folder / _POINTER
        name = _named(pointer)
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

    def _resumable(self) -> Path | None:
        newest = self._latest()
        others = [path for path in _numbered(self.folder) if newest is None or _number(path) < _number(newest)]
        damaged: dict[Path, str] = {}
        for path in [*([newest] if newest else []), *reversed(others)]:
            fault = damage(path)
            if fault is None:
                _set_aside(damaged, path)
                return path
            damaged[path] = fault
        if damaged or _named(self.folder / _POINTER):
            found = "; ".join(f"{path.name}: {fault}" for path, fault in damaged.items()) or "none is left"
            raise CheckpointError(
                f"{self.folder}: no checkpoint can be read ({found}); start anew in another output_dir, or with "
                f"checkpoint.resume=<file> from a copy{_or_best(self.folder)}"
            )
        return None

    def _prune(self, iteration: int) -> None:
        # Later ones than the one just written belong to another course of the run: not ours to remove.
        earlier = [path for path in _numbered(self.folder) if _number(path) <= iteration]
        old = [path for path in earlier[: -self.keep] if not self.keeps(_number(path))]
        for path in [*old, *self.folder.glob(".*.pth.tmp")]:
            path.unlink()


def _set_aside(damaged: Mapping[Path, str], used: Path) -> None:
    for path, fault in damaged.items():
        aside = path.with_name(f"{path.name}{_ASIDE}")
        path.replace(aside)
        _log.warning("%s is damaged (%s): set aside as %s, resuming from %s", path, fault, aside.name, used.name)


def _named(pointer: Path) -> str:
    return pointer.read_text().strip() if pointer.is_file() else ""


def _or_best(folder: Path) -> str:
    best = folder / f"{_BEST}.pth"
    return f", or with checkpoint.resume={best}" if best.is_file() and damage(best) is None else ""


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


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0].rstrip(".")


def _of_system(error: BaseException) -> OSError:
    """The system's error that another one comes from."""
    found: BaseException | None = error
    while found is not None and not isinstance(found, OSError):
        found = found.__context__
    return found or OSError(str(error))


def _size(value: Any) -> int:
    """Bytes of all tensors in a value."""
    if isinstance(value, Tensor):
        return value.nbytes
    items = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return sum(map(_size, items))


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
