"""Told to stop: a run that gets SIGTERM, SIGUSR1 or SIGUSR2 finishes its iteration, writes a checkpoint and ends.

A handler only takes the signal down. That it came, to whichever rank, every rank learns in the step's own reduction of
the losses, so that all of them end after the same iteration (docs/adr/0023); during an evaluation, between two batches.
The same command goes on where the run ended. SLURM's job is put back into the queue by rank 0.
"""

from __future__ import annotations

import logging
import math
import os
import re
import signal
import subprocess
import threading
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks, all_reduce_sum
from mtl_rcnn.evaluation.inference import EvaluationSet

__all__ = [
    "SIGNALS",
    "EvaluationLeft",
    "Preempted",
    "StopRequest",
    "interruptible",
    "requeue",
    "slurm_job",
    "stop_requests",
]

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2)
"""Submitit asks SLURM for SIGUSR2. Its own handler requeues the job too, but at once, without a checkpoint."""

_SCONTROL_SECONDS = 60
_RUNNING = ("RUNNING", "SUSPENDED")

logger = logging.getLogger(__name__)


class Preempted(SystemExit):
    """The run was told to stop and has written a checkpoint. Ends the process with 128 + the signal's number, so that
    nothing that a script does after a training takes it for complete."""


class EvaluationLeft(Exception):
    """An evaluation was left, on every rank, because one of them was told to stop."""


class StopRequest:
    """Whether this process was told to stop.

    Args:
        repeat_s: seconds within which a further signal counts as a copy of the first: SLURM and torchrun may both send
            one. A later one ends the process at once; the last checkpoint is whole whenever that happens.

    Attributes:
        signal: the first that came, None before.
    """

    def __init__(self, repeat_s: float) -> None:
        self.repeat_s = repeat_s
        self.signal: signal.Signals | None = None
        self._since = 0.0
        self._process = os.getpid()

    def __call__(self) -> bool:
        """Whether a signal has come."""
        return self.signal is not None

    def handle(self, number: int, frame: FrameType | None = None) -> None:
        """Takes a signal down: a signal handler."""
        if os.getpid() != self._process:
            return  # a loader's worker got it too: it works on until this process ends it
        if self.signal is None:
            self.signal, self._since = signal.Signals(number), time.monotonic()
        elif time.monotonic() - self._since >= self.repeat_s:
            signal.signal(number, signal.SIG_DFL)
            os.kill(self._process, number)

    def end(self, folder: Path, ranks: Ranks, requeued: bool) -> Preempted:
        """What every rank raises when the checkpoint is written. Rank 0 says so in one line and requeues SLURM's job if
        `requeued` asks for it. No signal ends the process from here on: SLURM sends one to a job that it requeues."""
        self.repeat_s = math.inf
        number = self.signal or signal.SIGTERM  # another rank's, of which this one knows no more
        if ranks.is_main:
            job = slurm_job(os.environ)
            after = f"; {requeue(job)}" if requeued and job else ""
            told = number.name if self.signal else "a signal to another rank"
            logger.warning("stopped by %s; the same command with output_dir=%s goes on there%s", told, folder, after)
        return Preempted(128 + number)


@contextmanager
def stop_requests(repeat_s: float) -> Iterator[StopRequest]:
    """Handles `SIGNALS` inside; afterwards they do what they did before. Outside the main thread, where Python allows
    no handlers, nothing is handled."""
    request = StopRequest(repeat_s)
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    before = {number: signal.signal(number, request.handle) for number in SIGNALS}
    try:
        yield request
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def slurm_job(environ: Mapping[str, str]) -> str | None:
    """What `scontrol` knows this job by, None outside SLURM. A job of an array goes by its place: the number of one of
    them is the array's too, and means them all."""
    array, place = environ.get("SLURM_ARRAY_JOB_ID"), environ.get("SLURM_ARRAY_TASK_ID")
    return f"{array}_{place}" if array and place else environ.get("SLURM_JOB_ID")


def requeue(job: str) -> str:
    """Puts a SLURM job back into the queue, unless it was cancelled or is over; returns what happened, in words."""
    try:
        state = re.search(r"JobState=(\w+)", _scontrol("show", "job", "-o", job))
        if state and state[1] not in _RUNNING:
            return f"job {job} is {state[1]} and not requeued"
        _scontrol("requeue", job)
    except (OSError, subprocess.SubprocessError) as error:
        why = getattr(error, "stderr", None) or str(error)
        return f"job {job} could not be requeued ({' '.join(why.split())}): start it again by hand"
    return f"job {job} is requeued"


def _scontrol(*arguments: str) -> str:
    command = ["scontrol", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True, timeout=_SCONTROL_SECONDS).stdout


def interruptible(sets: Sequence[EvaluationSet], told: StopRequest, device: torch.device) -> list[EvaluationSet]:
    """The same sets, whose loaders raise `EvaluationLeft`, on every rank, after one of them was told to stop."""
    return [
        replace(
            entry,
            loader=_Interruptible(entry.loader, told, device),
            labelled=None if entry.labelled is None else _Interruptible(entry.labelled, told, device),
        )
        for entry in sets
    ]


class _Interruptible:
    """A loader that ends early when this rank is told to stop. At the end of it the ranks agree."""

    def __init__(self, loader: Iterable[Sequence[Sample]], told: StopRequest, device: torch.device) -> None:
        self.loader, self.told, self.device = loader, told, device

    def __iter__(self) -> Iterator[Sequence[Sample]]:
        for batch in self.loader:
            if self.told():
                break
            yield batch
        if all_reduce_sum(torch.tensor(float(self.told()), device=self.device)) > 0:
            raise EvaluationLeft

    def __getattr__(self, name: str) -> Any:
        return getattr(self.loader, name)  # its length and what it left out
