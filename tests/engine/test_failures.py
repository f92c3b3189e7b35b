"""One rank of two fails, is killed, or is stopped: both end, with one message that says which rank, where, and why."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import run_ranks, start_ranks

from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.run import leave_in_log, setup_logging

HOST = socket.gethostname()

_HEAD = """
import ctypes, os, signal, sys, time
import torch
from omegaconf import OmegaConf
from mtl_rcnn.engine import distributed as engine
from mtl_rcnn.engine.failures import joined
from mtl_rcnn.errors import TrainingError
rank, how = int(sys.argv[1]), sys.argv[2]
cluster = {"kind": "local", "timeout_s": 100, "heartbeat_s": 2}
with joined(OmegaConf.create({"device": "cpu", "cluster": cluster})) as ranks:
    engine.barrier()
    before = time.monotonic()
"""

_FAILING = (
    _HEAD
    + """
    if ranks.rank == rank:
        if how == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "stopped":
            os.kill(os.getpid(), signal.SIGSTOP)
        if how == "machine":
            time.sleep(4)  # until its guard has been heard
            for process in [int(name) for name in os.listdir("/proc") if name.isdecimal()]:
                if open(f"/proc/{process}/stat").read().rpartition(")")[2].split()[1] == str(os.getpid()):
                    os.kill(process, signal.SIGSTOP)  # its guard
            os.kill(os.getpid(), signal.SIGSTOP)
        raise TrainingError("boxes: image 7") if how == "known" else ValueError("surprise")
    while True:
        engine.all_reduce_sum(torch.ones(1))
"""
)

_IN_NO_COLLECTIVE = (
    _HEAD
    + """
    if ranks.rank == rank:
        raise ValueError("surprise")
    time.sleep(300)  # only the watch can end it
"""
)

_BUSY = (
    _HEAD
    + """
    if ranks.rank == rank:
        ctypes.PyDLL(None).sleep(10)  # with the interpreter's lock, so that none of its threads runs
    engine.barrier()
print("done")
"""
)


def fail(script: str, rank: int, how: str) -> tuple[tuple[int, ...], tuple[str, ...], float]:
    """Exit statuses and outputs of both ranks, and the seconds they took, with their start."""
    begun = time.monotonic()
    codes, outputs = zip(*run_ranks(["-c", script, str(rank), how], 2, timeout=100))
    return codes, outputs, time.monotonic() - begun


@pytest.mark.parametrize(("failing", "kind", "status"), [(1, "unknown", 1), (0, "unknown", 1), (1, "known", 2)])
def test_one_failure_ends_both(failing: int, kind: str, status: int) -> None:
    codes, outputs, seconds = fail(_FAILING, failing, kind)
    assert codes[failing] == status, outputs
    assert codes[1 - failing] != 0
    assert seconds < 30
    text = "boxes: image 7" if kind == "known" else "ValueError: surprise"
    assert f"\nerror on rank {failing} ({HOST}): {text}\n" in "\n" + outputs[failing]
    assert ("Traceback" in outputs[failing]) == (kind == "unknown"), "the text of our own errors is enough"
    other = outputs[1 - failing]
    assert "Traceback" not in other
    assert f"error on rank {1 - failing}" not in other, "what follows from the first failure is not reported"
    if failing == 1:
        assert f"rank 0 ends: error on rank 1 ({HOST}): {text}\n" in other


def test_failure_ends_a_rank_outside_collectives() -> None:
    codes, outputs, seconds = fail(_IN_NO_COLLECTIVE, 1, "")
    assert codes == (1, 1), outputs
    assert seconds < 30
    assert f"rank 0 ends: error on rank 1 ({HOST}): ValueError: surprise" in outputs[0]


def test_a_killed_rank_is_named() -> None:
    codes, outputs, seconds = fail(_FAILING, 1, "killed")
    assert codes == (1, -signal.SIGKILL), outputs
    assert seconds < 30
    assert f"rank 0 ends: error on rank 1 ({HOST}): its process was killed (by SIGKILL where" in outputs[0]
    assert (outputs[0] + outputs[1]).count("error on rank") == 1, outputs


def test_killed_rank_0_is_named_by_its_guard() -> None:
    codes, outputs, seconds = fail(_FAILING, 0, "killed")
    assert codes == (-signal.SIGKILL, 1), outputs
    assert seconds < 30
    assert outputs[0].startswith(f"error on rank 0 ({HOST}): its process was killed"), "the store ended with it"
    assert "error on rank" not in outputs[1], "rank 1 is on the same machine"


@pytest.mark.parametrize("stopped", [0, 1])
def test_a_stopped_rank_ends_both(stopped: int) -> None:
    codes, outputs, seconds = fail(_FAILING, stopped, "stopped")
    assert codes[stopped] == -signal.SIGKILL, "its guard ends it"
    assert codes[1 - stopped] == 1, outputs
    assert seconds < 30
    text = f"error on rank {stopped} ({HOST}): its process has been stopped (SIGSTOP) for 2 s"
    assert text in outputs[1 - stopped] if stopped else outputs[0]


@pytest.mark.parametrize("frozen", [0, 1])
def test_a_machine_that_hangs_ends_the_others(frozen: int) -> None:
    """As if: a rank is stopped together with its guard. Nobody is left there to end them; a launcher would."""
    processes = _start_two(_FAILING, frozen, "machine")
    try:
        said = processes[1 - frozen].communicate(timeout=60)[0]
        assert processes[frozen].poll() is None
        assert processes[1 - frozen].returncode != 0
        assert f"error on rank {frozen} (" in said
        assert "no sign of life for 7 s: its machine or the network hangs" in said
    finally:
        os.killpg(processes[frozen].pid, signal.SIGKILL)
        processes[frozen].communicate(timeout=30)


def test_a_rank_that_is_busy_with_the_interpreters_lock_is_not_taken_for_dead() -> None:
    codes, outputs, _ = fail(_BUSY, 1, "")
    assert codes == (0, 0), outputs
    assert outputs == ("done\n", "done\n")


def test_a_job_that_is_stopped_as_a_whole_goes_on() -> None:
    processes = _start_two(_BUSY, 1, "")
    time.sleep(8)
    for number in (signal.SIGSTOP, signal.SIGCONT):
        for process in processes:
            os.killpg(process.pid, number)
        time.sleep(9 if number == signal.SIGSTOP else 0)
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert outputs == ["done\n", "done\n"]


def test_sigquit_writes_stacks_into_the_log(tmp_path: Path) -> None:
    ranks = Ranks(1, 2, 1, torch.device("cpu"))
    setup_logging(tmp_path, ranks)
    try:
        os.kill(os.getpid(), signal.SIGQUIT)
        leave_in_log("error on rank 0: as told")
    finally:
        setup_logging(None, ranks)
    log = (tmp_path / "log_rank_1.txt").read_text()
    assert log.count("in test_sigquit_writes_stacks_into_the_log") == 2
    assert "error on rank 0: as told" in log


def test_torchrun_sets_the_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", _FAILING, "1", "known"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode != 0
    assert f"\n{run.stderr}".count(f"\nerror on rank 1 ({HOST}): boxes: image 7\n") == 1, run.stderr


def _start_two(script: str, rank: int, how: str) -> list[subprocess.Popen[str]]:
    """Two ranks, each in a process group of its own."""
    return start_ranks(["-c", script, str(rank), how], 2, start_new_session=True)
