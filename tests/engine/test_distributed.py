"""Two gloo processes speak with each other. The environment, read and refused."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

from mtl_rcnn.engine import distributed as engine
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.errors import ConfigError

_HEAD = """
import os, sys, time
import torch
from detectron2.utils import comm
from mtl_rcnn.engine import distributed as engine
from mtl_rcnn.engine.failures import fail_together
with engine.distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
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


def test_two_ranks_speak_and_end() -> None:
    codes, outputs = zip(*run_ranks(["-c", _COLLECTIVES], 2))
    assert codes == (0, 0), outputs
    assert ["done 0" in outputs[0], "done 1" in outputs[1]] == [True, True]
    assert "connection lost" not in outputs[0] + outputs[1]


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
        with pytest.raises(KeyError, match="passes through"), fail_together(ranks):
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
