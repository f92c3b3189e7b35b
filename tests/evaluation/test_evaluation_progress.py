"""The progress line: numbers from a clock that the test turns."""

from __future__ import annotations

import io
import logging

from rich.console import Console

from mtl_rcnn.evaluation.progress import Progress, clock_text


class Clock:
    def __init__(self):
        self.now = 50.0

    def __call__(self):
        return self.now


def run(console, clock, **options):
    with Progress("evaluating toy", 40, console=console, clock=clock, **options) as progress:
        for _ in range(4):
            clock.now += 2
            progress.advance(5)
    return progress


def test_plain_lines_come_every_few_seconds_with_rate_and_eta(caplog):
    caplog.set_level(logging.INFO)
    run(Console(file=io.StringIO(), force_terminal=False), Clock(), period=4)
    assert caplog.messages == [
        "evaluating toy: 10/40 images, 2.5 img/s, ETA 0:00:12",
        "evaluating toy: 20/40 images, 2.5 img/s, ETA 0:00:08",
        "evaluating toy: 20 images in 0:00:08, 2.5 img/s",
    ]


def test_a_terminal_gets_a_bar_and_one_final_line(caplog):
    caplog.set_level(logging.INFO)
    terminal = io.StringIO()
    run(Console(file=terminal, force_terminal=True, width=100), Clock())
    assert "evaluating toy" in terminal.getvalue()
    assert "20/40" in terminal.getvalue()
    assert caplog.messages == ["evaluating toy: 20 images in 0:00:08, 2.5 img/s"]


def test_without_a_known_end_there_is_no_eta(caplog):
    caplog.set_level(logging.INFO)
    clock = Clock()
    drawn = {kind: io.StringIO() for kind in (True, False)}
    for kind, file in drawn.items():
        console = Console(file=file, force_terminal=kind, width=100)
        with Progress("predicting", None, console=console, clock=clock, period=4) as progress:
            clock.now += 5
            progress.advance(10)
    assert "10/?" in drawn[True].getvalue()
    assert caplog.messages.count("predicting: 10 images, 2.0 img/s") == 1


def test_other_ranks_are_silent(caplog):
    caplog.set_level(logging.INFO)
    terminal = io.StringIO()
    progress = run(Console(file=terminal, force_terminal=True), Clock(), enabled=False)
    assert (terminal.getvalue(), caplog.messages, progress.done) == ("", [], 20)


def test_clock_text():
    assert [clock_text(seconds) for seconds in (0, 61.6, 3723)] == ["0:00:00", "0:01:02", "1:02:03"]
