"""Two gloo processes: collectives, and one failure that ends both. The environment, read and refused."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time

import pytest
import torch

from mtl_rcnn.engine import distributed as engine
from mtl_rcnn.errors import ConfigError

_HEAD = """
import os, sys, time
import torch
from detectron2.utils import comm
from mtl_rcnn.engine import distributed as engine
from mtl_rcnn.errors import TrainingError
with engine.distributed("cpu", timeout_s=100) as ranks, engine.fail_together(ranks):
"""

_COLLECTIVES = (
    _HEAD
    + """
    count = torch.tensor([ranks.rank + 1.0])
    assert engine.all_reduce_sum(count).item() == 3 and count.item() == ranks.rank + 1
    assert engine.broadcast_object({"from": ranks.rank}) == {"from": 0}
    assert engine.is_main() == ranks.is_main == (ranks.rank == 0) and engine.world_size() == 2
    assert comm.get_rank() == ranks.rank and comm.all_gather(ranks.rank) == [0, 1]
    assert comm.gather("ab"[ranks.rank]) == (["a", "b"] if ranks.rank == 0 else [])
    time.sleep(2 * ranks.rank)  # rank 0 is done before
print(f"done {ranks.rank}")
"""
)

_FAILURE = (
    _HEAD
    + """
    if ranks.rank == int(sys.argv[1]):
        if sys.argv[2] == "killed":
            os.kill(os.getpid(), 9)
        raise TrainingError("boxes: image 7") if sys.argv[2] == "known" else ValueError("surprise")
    while True:
        engine.all_reduce_sum(torch.ones(1))
"""
)

_STUCK = (
    _HEAD
    + """
    if ranks.rank == 1:
        raise ValueError("surprise")
    time.sleep(300)  # in no collective: only the watch can end it
"""
)


def _free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def _run_ranks(script: str, *args: str) -> tuple[list[int], list[str], float]:
    """Exit status and standard error + output of both ranks, and the seconds they took (start-up included)."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": _free_port(), "OMP_NUM_THREADS": "1"}
    begun = time.monotonic()
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", script, *args],
            env={**os.environ, **common, "RANK": rank, "LOCAL_RANK": rank},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for rank in ("0", "1")
    ]
    try:
        outputs = [process.communicate(timeout=100)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [process.returncode for process in processes], outputs, time.monotonic() - begun


def test_two_ranks_speak_and_end() -> None:
    codes, outputs, _ = _run_ranks(_COLLECTIVES)
    assert codes == [0, 0], outputs
    assert ["done 0" in outputs[0], "done 1" in outputs[1]] == [True, True]
    assert "connection lost" not in outputs[0] + outputs[1]


@pytest.mark.parametrize(("failing", "kind", "status"), [(1, "unknown", 1), (0, "unknown", 1), (1, "known", 2)])
def test_one_failure_ends_both(failing: int, kind: str, status: int) -> None:
    codes, outputs, seconds = _run_ranks(_FAILURE, str(failing), kind)
    assert codes[failing] == status, outputs
    assert codes[1 - failing] != 0
    assert seconds < 30
    text = "boxes: image 7" if kind == "known" else "ValueError: surprise"
    assert f"\nerror on rank {failing}: {text}\n" in "\n" + outputs[failing]
    assert ("Traceback" in outputs[failing]) == (kind == "unknown"), "the text of our own errors is enough"
    other = outputs[1 - failing]
    assert "Traceback" not in other
    assert f"error on rank {1 - failing}" not in other, "what follows from the first failure is not reported"
    if failing == 1:
        assert f"rank 0 ends: error on rank 1: {text}\n" in other


def test_failure_ends_a_rank_outside_collectives() -> None:
    codes, outputs, seconds = _run_ranks(_STUCK)
    assert codes == [1, 1], outputs
    assert seconds < 30
    assert "rank 0 ends: error on rank 1: ValueError: surprise" in outputs[0]


@pytest.mark.parametrize("killed", [0, 1])
def test_killed_rank_ends_the_other(killed: int) -> None:
    codes, outputs, seconds = _run_ranks(_FAILURE, str(killed), "killed")
    assert codes[killed] == -signal.SIGKILL
    assert codes[1 - killed] == 1, outputs
    assert seconds < 30


def test_torchrun_sets_the_ranks() -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    run = subprocess.run(
        [*command, "--no-python", sys.executable, "-c", _FAILURE, "1", "known"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert run.returncode != 0
    assert f"\n{run.stderr}".count("\nerror on rank 1: boxes: image 7\n") == 1, run.stderr


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with engine.distributed("cpu") as ranks:
        assert ranks == engine.Ranks(0, 1, 0, torch.device("cpu"))
        assert engine.is_main()
        assert engine.broadcast_object([1]) == [1]
        assert torch.equal(engine.all_reduce_sum(torch.ones(2)), torch.ones(2))
        engine.barrier()
        assert not torch.distributed.is_initialized()
        with pytest.raises(KeyError, match="passes through"), engine.fail_together(ranks):
            raise KeyError("passes through")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"MASTER_PORT": None}, "MASTER_PORT not set although RANK or WORLD_SIZE is; start with torchrun"),
        ({"RANK": "2"}, r"RANK=2 and LOCAL_RANK=0 must lie in \[0, WORLD_SIZE\) with WORLD_SIZE=2"),
        ({"WORLD_SIZE": "two"}, "WORLD_SIZE='two' is not a whole number"),
    ],
)
def test_wrong_environment_is_named(
    monkeypatch: pytest.MonkeyPatch, change: dict[str, str | None], message: str
) -> None:
    right = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    for name, value in {**right, **change}.items():
        if value is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        engine.init("cpu")


def test_wrong_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(ConfigError, match="device: expected auto, cpu or cuda, got 'gpu'"):
        engine.init("gpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert engine.init("auto").device.type == "cpu"
    with pytest.raises(ConfigError, match="device: cuda was asked for but PyTorch sees no GPU"):
        engine.init("cuda")
