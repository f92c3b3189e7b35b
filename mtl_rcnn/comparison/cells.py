"""Trains the cells of a comparison, each in a process of its own, and reads what they left.

<folder>/configs/<cell>.yaml     its configuration, with which tools/train_net.py trains it alone
<folder>/runs/<cell>/            its run, and what it printed: console.txt
<folder>/runs/<cell>/cell.json   written when it is complete: it is not trained again
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import yaml
from omegaconf import OmegaConf

from mtl_rcnn.comparison.plan import Cell
from mtl_rcnn.config.diff import config_diff, format_diff
from mtl_rcnn.engine.cluster import without_step
from mtl_rcnn.engine.progress import read_metrics as read_progress
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.progress import clock_text
from mtl_rcnn.evaluation.results import read_metrics, write_json, write_text

logger = logging.getLogger(__name__)

_HYDRA = {
    "defaults": ["_self_", {"override hydra/job_logging": "disabled"}, {"override hydra/hydra_logging": "disabled"}]
}
_FREE = ("threads", "device", "cluster", "data.workers", "report", "trackers", "evaluation", "solver.log_period")
"""Settings that may change between the cells of a comparison: none of them is told to change what is learned."""


@dataclass(frozen=True)
class Result:
    """What a complete training left.

    Attributes:
        metrics: of the evaluation after the last iteration, by "dataset/task/metric".
        step_seconds: median over the log's lines, without evaluation and checkpoints.
        iterations: of the training.
        code: state of the code, as the run noted it.
    """

    metrics: Mapping[str, Metric]
    step_seconds: float
    iterations: int
    code: str


def train_cells(cells: Sequence[Cell], folder: Path, launch: Sequence[str]) -> list[str]:
    """Trains what is not complete and not being trained by another process; goes on after a failure.

    Returns:
        What failed, a line each.

    Raises:
        ConfigError: a cell was begun with other settings.
    """
    for cell in cells:
        _write_config(cell, folder)
    todo = [cell for cell in cells if not is_complete(cell)]
    logger.info("%d trainings, %d of them complete", len(cells), len(cells) - len(todo))
    failures, spent = [], 0.0
    for number, cell in enumerate(todo):
        with _claimed(cell) as mine:
            if not mine:
                logger.info("%s: another process trains it", cell.name)
                continue
            if is_complete(cell):  # meanwhile
                continue
            started = time.monotonic()
            failure = _train(cell, folder, launch)
        spent += time.monotonic() - started
        if failure:
            failures.append(failure)
        left = spent / (number + 1) * (len(todo) - number - 1)
        told = failure or f"{cell.name}: complete after {clock_text(time.monotonic() - started)}"
        logger.info("%s; %d of %d, ETA %s", told, number + 1, len(todo), clock_text(left))
    return failures


def is_complete(cell: Cell) -> bool:
    """Whether the cell has been trained and evaluated to its end."""
    return (cell.folder / "cell.json").is_file()


def read_result(cell: Cell) -> Result:
    """What a complete cell left."""
    kept = json.loads((cell.folder / "cell.json").read_text(encoding="utf-8"))
    return Result(read_metrics(cell.folder), **kept)


def _train(cell: Cell, folder: Path, launch: Sequence[str]) -> str | None:
    """Trains one cell; returns what went wrong."""
    command = [*(launch or [sys.executable]), "-m", "mtl_rcnn.train"]
    command += [f"--config-dir={(folder / 'configs').resolve()}", f"--config-name={cell.name}"]
    console = cell.folder / "console.txt"
    with console.open("ab") as output:
        status = subprocess.run(
            command, env=without_step(os.environ), stdout=output, stderr=subprocess.STDOUT, check=False
        ).returncode
    if status:
        return f"{cell.name}: ended with status {status}: {_last_line(console)} ({console})"
    _complete(cell)
    return None


def _complete(cell: Cell) -> None:
    rows = read_progress(cell.folder / "metrics.jsonl", timings=True)
    steps = [row["time/iteration_s"] for row in rows if row.get("time/iteration_s") is not None]
    code = next(
        line
        for line in (cell.folder / "command.txt").read_text(encoding="utf-8").splitlines()
        if line.startswith("git")
    )
    kept = {
        "step_seconds": statistics.median(steps) if steps else 0.0,
        "iterations": max(row["iteration"] for row in rows),
        "code": code.removeprefix("git: "),
    }
    write_json(cell.folder / "cell.json", kept)


def _write_config(cell: Cell, folder: Path) -> None:
    """Writes the configuration, or compares it with that with which the cell was begun."""
    path = folder / "configs" / f"{cell.name}.yaml"
    content = OmegaConf.to_container(cell.cfg, resolve=True)
    if path.is_file() and cell.folder.is_dir():
        _check_same(cell, path, content)
    if is_complete(cell):
        return
    text = yaml.safe_dump(
        {**_HYDRA, **content, "hydra": {"run": {"dir": "."}, "output_subdir": None}}, sort_keys=False, width=120
    )
    write_text(path, text)


def _check_same(cell: Cell, path: Path, content: Mapping[str, object]) -> None:
    before = {
        key: value
        for key, value in yaml.safe_load(path.read_text(encoding="utf-8")).items()
        if key not in ("defaults", "hydra")
    }
    changed = [
        difference
        for difference in config_diff(OmegaConf.create(dict(content)), OmegaConf.create(before))
        if not any(difference.key == key or difference.key.startswith(f"{key}.") for key in _FREE)
    ]
    if changed:
        raise ConfigError(
            f"output_dir: {cell.name} was begun with other settings, and a comparison needs one budget for all; choose "
            f"another output_dir, or undo: {format_diff(changed).strip()}"
        )


@contextmanager
def _claimed(cell: Cell) -> Iterator[bool]:
    """Whether this process may train the cell: none other does. The claim ends with the process."""
    cell.folder.mkdir(parents=True, exist_ok=True)
    with (cell.folder / ".claim").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            yield False
            return
        yield True


def _last_line(path: Path) -> str:
    lines = [line for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "it printed nothing"
