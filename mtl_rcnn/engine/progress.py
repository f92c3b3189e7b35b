"""What a run tells while it trains: one line on the terminal, `metrics.jsonl`, TensorBoard. Rank 0 only.

Numbers come in two kinds, kept apart everywhere: `scalars` (losses, learning rate, metrics) are the same when the run
is repeated or resumed, `timings` (speed, memory) are not and stand under `time/` in the files. Values are written as
they are, not smoothed over earlier iterations, so that a resumed run writes what the uninterrupted one would have.

Iterations are counted from 1: iteration n is written after n training steps. `start` is the iteration of the checkpoint
that the run resumes from, or 0; whatever an earlier course of the run wrote beyond it is cut off.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from detectron2.utils.events import EventStorage
from rich.console import Console
from rich.live import Live
from rich.text import Text

from mtl_rcnn.engine.atomic import cannot_write
from mtl_rcnn.errors import TrainingError

__all__ = [
    "ImageWriter",
    "JsonLinesWriter",
    "ProgressWriter",
    "TensorboardWriter",
    "UserScalars",
    "Writer",
    "Writers",
    "read_metrics",
]

_TIME = "time/"


class Writer(Protocol):
    """Takes the numbers of one iteration somewhere."""

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        """Writes one iteration; scalars are named like `<task>/<part>`, timings as `Stopwatch` does."""

    def close(self) -> None:
        """Writes what is left."""


class ImageWriter(Protocol):
    """A writer that takes pictures too."""

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Writes (H, W, 3) uint8 RGB pictures by title."""


class Writers:
    """Several writers as one. Use as a context manager."""

    def __init__(self, writers: Sequence[Writer]) -> None:
        self.writers = tuple(writers)

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        for writer in self.writers:
            writer.write(iteration, scalars, timings)

    @property
    def rows(self) -> int | None:
        """Rows of `metrics.jsonl` so far, for a checkpoint; None if nobody writes one."""
        return next((writer.rows for writer in self.writers if isinstance(writer, JsonLinesWriter)), None)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        """Pictures, to the writers that take some."""
        for writer in self.writers:
            if hasattr(writer, "write_images"):
                writer.write_images(iteration, images)

    def close(self) -> None:
        for writer in self.writers:
            writer.close()

    def __enter__(self) -> Writers:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class ProgressWriter:
    """One live line on a terminal, one printed line per call elsewhere.

    Args:
        max_iter: iterations of the whole run.
        groups: show the scalars `<group>/<name>` of these groups (the tasks), None: of all. Names without a slash
            always.
        console: where to; standard output by default.
    """

    def __init__(self, max_iter: int, groups: Iterable[str] | None = None, console: Console | None = None) -> None:
        self.max_iter = max_iter
        self.groups = None if groups is None else frozenset(groups)
        self.console = console or Console()
        self._live: Live | None = None

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        shown = {name: value for name, value in scalars.items() if self._shows(name)}
        numbers = f"{_format_scalars(shown)}  {_format_timings(timings)}".strip()
        if not numbers:
            return  # metrics and the like: the line of losses stays
        line = f"iter {iteration}/{self.max_iter}  {numbers}"
        if not self.console.is_terminal:
            # Not through rich, which would wrap it.
            print(line, file=self.console.file, flush=True)
            return
        if self._live is None:
            self._live = Live(console=self.console, auto_refresh=False)
            self._live.start()
        self._live.update(Text(line), refresh=True)

    def close(self) -> None:
        """Leaves the last line standing and gives the terminal back."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _shows(self, name: str) -> bool:
        return self.groups is None or "/" not in name or name.split("/", 1)[0] in self.groups


class JsonLinesWriter:
    """One JSON object per call: `iteration`, the scalars, and the timings as `time/<name>`. Not finite values are null.

    Args:
        path: the file; made if missing, else continued after iteration `start`.
        start: see the module.
        rows: of the file when the checkpoint was written: an evaluation may have written one more, of the same
            iteration, that is repeated. None: not known.

    Raises:
        TrainingError: the file holds something else, or cannot be written.
    """

    def __init__(self, path: Path, start: int = 0, rows: int | None = None) -> None:
        path = Path(path)
        kept = [line for iteration, line in _lines(path) if iteration <= start] if path.is_file() else []
        kept = kept[:rows]
        self.rows = len(kept)
        temporary = path.with_name(f".{path.name}.tmp")
        with open(temporary, "w", encoding="utf-8") as file:
            file.writelines(line + "\n" for line in kept)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (closed by close)

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        values = {**scalars, **{_TIME + name: value for name, value in timings.items()}}
        row = {"iteration": iteration} | {name: _finite(value) for name, value in sorted(values.items())}
        try:
            self._file.write(json.dumps(row, allow_nan=False) + "\n")
            self._file.flush()
            os.fsync(self._file.fileno())  # on the disk before a checkpoint of the same iteration is
        except OSError as error:
            raise TrainingError(f"{self._file.name}: {cannot_write(Path(self._file.name), error)}") from error
        self.rows += 1

    def close(self) -> None:
        with suppress(OSError):  # `write` has told what the disk did not take
            self._file.close()


class TensorboardWriter:
    """TensorBoard event files: scalars, and pictures of the evaluation.

    A hook that puts histograms or pictures of its own into the EventStorage runs Detectron2's own writer for them:
    `hooks.PeriodicWriter([TensorboardXWriter(folder)])`.

    Args:
        folder: where the event files lie.
        start: see the module; TensorBoard hides what earlier files hold beyond it.
    """

    def __init__(self, folder: Path, start: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # slow to import

        self._writer = SummaryWriter(str(folder), purge_step=start + 1)

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        for name, value in scalars.items():
            self._writer.add_scalar(name, value, iteration)
        for name, value in timings.items():
            self._writer.add_scalar(_TIME + name, value, iteration)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        for title, image in images.items():
            self._writer.add_image(f"predictions/{title}", image, iteration, dataformats="HWC")

    def close(self) -> None:
        self._writer.close()


class UserScalars:
    """What hooks put into Detectron2's EventStorage with `get_event_storage().put_scalar(name, value)`."""

    def __init__(self, storage: EventStorage) -> None:
        self._storage = storage
        self._seen: dict[str, int] = {}

    def new(self) -> dict[str, float]:
        """Latest values of the scalars that were put at another iteration since the last call, by name."""
        latest = self._storage.latest()
        fresh = {name: value for name, (value, iteration) in latest.items() if self._seen.get(name) != iteration}
        self._seen.update({name: iteration for name, (_, iteration) in latest.items()})
        return fresh


def read_metrics(path: Path, timings: bool = False) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, without the timings unless asked for: equal for equal runs."""
    rows = [json.loads(line) for _, line in _lines(Path(path))]
    return rows if timings else [{k: v for k, v in row.items() if not k.startswith(_TIME)} for row in rows]


def _lines(path: Path) -> list[tuple[int, str]]:
    """(iteration, line) of each whole line. A last line without its end was cut off by a crash and is left out."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], start=1):
        try:
            found.append((int(json.loads(line)["iteration"]), line))
        except (ValueError, KeyError, TypeError) as error:
            raise TrainingError(
                f"{path}:{number}: expected a JSON object with an iteration, got {line[:80]!r}; "
                "remove the line, or move the file away to start a new one"
            ) from error
    return found


def _finite(value: float) -> float | None:
    value = float(value)
    return value if math.isfinite(value) else None


def _format_scalars(scalars: Mapping[str, float]) -> str:
    """`total 2.31  lr 0.02  <task>[a 0.31 b 0.2]`: what has no slash first, the rest by the word before it."""
    plain = [f"{name} {value:.4g}" for name, value in scalars.items() if "/" not in name]
    groups: dict[str, list[str]] = {}
    for name, value in scalars.items():
        if "/" in name:
            group, part = name.split("/", 1)
            groups.setdefault(group, []).append(f"{part} {value:.3g}")
    return "  ".join([*plain, *(f"{group}[{' '.join(parts)}]" for group, parts in groups.items())])


def _format_timings(timings: Mapping[str, float]) -> str:
    formats: dict[str, Callable[[float], str]] = {
        "img_per_s": lambda v: f"{v:.1f} img/s",
        "data_share": lambda v: f"data {v:.0%}",
        "memory_bytes": lambda v: f"mem {v / 2**30:.1f}G",
        "eta_s": lambda v: f"eta {timedelta(seconds=round(v))}",
    }
    return "  ".join(show(timings[name]) for name, show in formats.items() if name in timings)
