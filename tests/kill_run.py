"""Kills a training run at random moments, as a power cut would, and compares what comes out in the end.

python tests/kill_run.py --kills 20     prints a line per kill and the sums that docs/reliability.md shows

A course is one run on the toy images, killed and started again until it is complete. Every other kill waits for a
checkpoint that is being written. Every other course writes its checkpoints asynchronously. Processes are forked, so
that a start costs no imports; SIGKILL ends them whatever they do.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import suppress
from pathlib import Path

from omegaconf import DictConfig
from runs import assert_equal_runs
from test_train import toy_config
from toy import Toy, write_toy

from mtl_rcnn.engine.checkpoint import Checkpointer, damage
from mtl_rcnn.engine.train import train

OPTIONS = (
    *("solver.max_iter=20", "solver.checkpoint_period=1", "solver.eval_period=5", "checkpoint.keep=2"),
    *("checkpoint.keep_every=4", "solver.ema=0.9", "solver.steps=[15]"),
)
SECONDS_IN_WRITING = 0.005
"""A kill in writing comes so long after the temporary file appears, at most: about the time that writing it takes."""


def kill_until(toy: Toy, folder: Path, kills: int, seed: int) -> Counter[str]:
    """Kills courses until there were `kills`, and completes and compares every one.

    Returns:
        Numbers of `kills`, of those `in writing`, of `courses`, and of starts from `no checkpoint yet`.
    """
    rng, counts = random.Random(seed), Counter()
    _config(toy, folder, False)  # before the first fork
    began = time.monotonic()
    assert _wait(_start(toy, folder / "whole")) == 0
    usual = time.monotonic() - began
    while counts["kills"] < kills:
        counts["courses"] += 1
        run, asynchronous = folder / f"course_{counts['courses']}", counts["courses"] % 2 == 0
        while _killed(_start(toy, run, asynchronous), run, rng, usual, counts, kills):
            resumed = Checkpointer(run, keep=1).resumable()
            counts["no checkpoint yet"] += resumed is None
            assert not list(run.glob("*.corrupt"))
            print(f"kill {counts['kills']}: goes on from {resumed and resumed.name}", flush=True)
        assert_equal_runs(folder / "whole", run)
        assert all(damage(path) is None for path in run.glob("model_*.pth"))
        print(f"course {counts['courses']} equals the uninterrupted run", flush=True)
    return counts


def _config(toy: Toy, run: Path, asynchronous: bool) -> DictConfig:
    cfg = toy_config(toy, "unnamed", *OPTIONS, tasks=("detection",))  # composed once for all
    cfg.output_dir, cfg.checkpoint.asynchronous = str(run), asynchronous
    return cfg


def _start(toy: Toy, run: Path, asynchronous: bool = False) -> int:
    """The id of a new process that trains."""
    process = os.fork()
    if process == 0:
        status = 1
        try:
            sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (the process ends with it)
            train(_config(toy, run, asynchronous))
            status = 0
        finally:
            os._exit(status)
    return process


def _killed(process: int, run: Path, rng: random.Random, usual: float, counts: Counter[str], kills: int) -> bool:
    """Kills the process at a random moment; False if it was complete before, or if there were kills enough."""
    if counts["kills"] == kills:
        assert _wait(process) == 0
        return False
    moment = time.monotonic() + rng.uniform(0, usual)
    in_writing, delay = counts["kills"] % 2 == 1, rng.uniform(0, SECONDS_IN_WRITING)
    left = _unfinished(run)  # by earlier kills
    while time.monotonic() < moment or (in_writing and _unfinished(run) <= left):
        found, status = os.waitpid(process, os.WNOHANG)
        if found:
            assert status == 0, f"the run failed with status {status}: {(run / 'log.txt').read_text()}"
            return False
        time.sleep(0.0005)
    time.sleep(delay if in_writing else 0)
    os.kill(process, signal.SIGKILL)
    os.waitpid(process, 0)
    counts["kills"] += 1
    counts["in writing"] += not _unfinished(run) <= left
    return True


def _unfinished(run: Path) -> set[tuple[str, int]]:
    """Temporary files of checkpoints, with the time of their last change in nanoseconds."""
    with suppress(FileNotFoundError):  # one was finished meanwhile
        return {(path.name, path.stat().st_mtime_ns) for path in run.glob(".model_*.tmp")}
    return set()


def _wait(process: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        found = kill_until(write_toy(Path(place) / "toy"), Path(place), arguments.kills, arguments.seed)
    print(", ".join(f"{name}: {number}" for name, number in found.items()))
