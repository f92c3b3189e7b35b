"""What a run writes: grouped lines, a metrics file that a resumed run continues exactly, TensorBoard, speed."""

from __future__ import annotations

import io
import json
import math
from pathlib import Path

import pytest
import torch
from detectron2.utils.events import EventStorage, get_event_storage
from rich.console import Console
from runs import largest_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from mtl_rcnn.engine.progress import (
    JsonLinesWriter,
    ProgressWriter,
    TensorboardWriter,
    UserScalars,
    Writers,
    read_metrics,
)
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.errors import TrainingError

SCALARS = {"total": 2.3125, "lr": 0.02, "boxes/rpn": 0.3125, "depth/value": 0.5, "boxes/cls": 1.5, "extra/x": 7.0}
TIMINGS = {"img_per_s": 18.2, "data_share": 0.04, "memory_bytes": 1.25 * 2**30, "eta_s": 192.4}


def _console(**options: object) -> tuple[Console, io.StringIO]:
    stream = io.StringIO()
    return Console(file=stream, width=200, **options), stream


def test_plain_line_groups_the_losses() -> None:
    console, stream = _console()
    writer = ProgressWriter(1000, groups=["boxes", "depth"], console=console)
    writer.write(120, SCALARS, TIMINGS)
    writer.write(140, {"total": 1.0}, {})
    writer.close()
    assert stream.getvalue().splitlines() == [
        "iter 120/1000  total 2.312  lr 0.02  boxes[rpn 0.312 cls 1.5]  depth[value 0.5]  "
        "18.2 img/s  data 4%  mem 1.2G  eta 0:03:12",
        "iter 140/1000  total 1",
    ]


def test_terminal_has_one_line_that_changes() -> None:
    console, stream = _console(force_terminal=True)
    writer = ProgressWriter(10, console=console)
    for iteration in (1, 2, 3):
        writer.write(iteration, {"total": 1.0}, {})
    writer.close()
    text = stream.getvalue()
    assert "iter 3/10" in text
    assert text.count("\x1b[2K") >= 2, "each update erases the line before it"


def test_all_groups_show_unless_named() -> None:
    console, stream = _console()
    ProgressWriter(10, console=console).write(1, SCALARS, {})
    assert "extra[x 7]" in stream.getvalue()


def _write(path: Path, start: int, stop: int, speed: float) -> None:
    with Writers([JsonLinesWriter(path, start)]) as writers:
        for iteration in range(start + 1, stop + 1):
            writers.write(iteration, {"total": 1.0 / iteration}, {"img_per_s": speed})


def test_resumed_metrics_equal_the_uninterrupted(tmp_path: Path) -> None:
    _write(tmp_path / "whole.jsonl", 0, 6, 10.0)
    path = tmp_path / "resumed.jsonl"
    _write(path, 0, 5, 11.0)  # killed after 5, while writing line 6; its last checkpoint is of 3
    path.write_text(path.read_text() + '{"iteration": 6, "tot')
    _write(path, 3, 6, 12.0)
    assert read_metrics(path) == read_metrics(tmp_path / "whole.jsonl")
    assert [row["time/img_per_s"] for row in read_metrics(path, timings=True)] == [11.0] * 3 + [12.0] * 3
    assert not list(tmp_path.glob(".*")), "no temporary file stays"
    _write(path, 0, 2, 13.0)
    assert [row["iteration"] for row in read_metrics(path)] == [1, 2], "a new run starts a new curve"


def test_a_repeated_evaluation_leaves_one_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Writers([JsonLinesWriter(path)]) as writers:
        writers.write(1, {"total": 1.0}, {})
        rows = writers.rows
        writers.write(1, {"toy/x/AP": 2.0}, {})  # killed here: the checkpoint is of the moment before
    with Writers([JsonLinesWriter(path, 1, rows)]) as writers:
        assert writers.rows == 1
        writers.write(1, {"toy/x/AP": 2.0}, {})
    assert read_metrics(path) == [{"iteration": 1, "total": 1.0}, {"iteration": 1, "toy/x/AP": 2.0}]


def test_a_disk_that_takes_no_more_is_named(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with pytest.raises(
        TrainingError, match=r"metrics\.jsonl: cannot be written \(File too large; \d+ bytes are free\)"
    ):
        _fill(path)
    assert read_metrics(path) == [{"iteration": 1, "total": 1.0}]


def _fill(path: Path) -> None:
    with largest_file(40), Writers([JsonLinesWriter(path)]) as writers:
        for iteration in (1, 2):
            writers.write(iteration, {"total": 1.0}, {})


def test_metrics_are_standard_json(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    with Writers([JsonLinesWriter(path)]) as writers:
        writers.write(1, {"b": math.nan, "a": torch.tensor(2.0)}, {})
    assert path.read_text() == '{"iteration": 1, "a": 2.0, "b": null}\n'


@pytest.mark.parametrize("line", ["not json", '{"total": 1}', "[1]"])
def test_foreign_metrics_file_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(json.dumps({"iteration": 1}) + f"\n{line}\n")
    with pytest.raises(TrainingError, match=r"metrics\.jsonl:2: expected a JSON object"):
        JsonLinesWriter(path, 1)
    assert path.read_text().endswith(f"{line}\n"), "the file is left alone"


def test_tensorboard_hides_what_is_beyond_the_checkpoint(tmp_path: Path) -> None:
    for start, stop, value in ((0, 4, 1.0), (2, 3, 5.0)):
        with Writers([TensorboardWriter(tmp_path, start)]) as writers:
            for iteration in range(start + 1, stop + 1):
                writers.write(iteration, {"boxes/rpn": value}, {"img_per_s": 3.0})
        [file] = [p for p in tmp_path.iterdir() if p.suffix != ".old"]
        file.rename(tmp_path / f"events.out.tfevents.{start}.old")  # read in this order
    events = EventAccumulator(str(tmp_path)).Reload()
    assert [(event.step, event.value) for event in events.Scalars("boxes/rpn")] == [(1, 1.0), (2, 1.0), (3, 5.0)]
    assert events.Scalars("time/img_per_s")


def test_scalars_of_hooks_are_found_once() -> None:
    with EventStorage(0) as storage:
        user = UserScalars(storage)
        storage.iter = 3
        get_event_storage().put_scalar("mine/a", 1.0)
        assert user.new() == {"mine/a": 1.0}
        storage.iter = 4
        get_event_storage().put_scalar("mine/b", 2.0, smoothing_hint=False)
        assert user.new() == {"mine/b": 2.0}
        storage.iter = 5
        get_event_storage().put_scalar("mine/a", 3.0)
        assert user.new() == {"mine/a": 3.0}
        assert user.new() == {}


def test_stopwatch_counts_steps_only() -> None:
    now = iter([0.0, 8.0, 10.0, 100.0, 100.5, 102.0, 200.0, 200.5, 202.0])
    watch = Stopwatch(4, 13, torch.device("cpu"), clock=lambda: next(now))
    found = []
    for iteration in (1, 2, 3):
        watch.begin()
        watch.batch_ready()
        watch.end()
        if iteration != 2:
            found.append(watch.timings(iteration))
    first, later = found
    assert (first["img_per_s"], first["iteration_s"], first["data_share"], first["eta_s"]) == (0.4, 10.0, 0.8, 120.0)
    assert (later["img_per_s"], later["iteration_s"], later["data_share"]) == (2.0, 2.0, 0.25)
    assert later["eta_s"] == 20.0, "the first step, which warms up, does not count"
    assert 2**24 < later["memory_bytes"] < 2**40
    assert set(watch.timings(3)) == {"memory_bytes"}
