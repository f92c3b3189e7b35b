"""Balanced training on two ranks, and in micro-batches, is balanced training of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from balance_worker import BALANCING, TASKS, Bench
from ranks import ROOT, run_ranks
from tiny import need_tasks
from toy import Toy

from mtl_rcnn.engine.distributed import Ranks

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of (ranks, micro-batches per rank): 1 x 1, 2 x 1, 2 x 2."""
    need_tasks(*TASKS)
    folder = tmp_path_factory.mktemp("balance")
    for world, accumulate in ((1, 1), (2, 1), (2, 2)):
        command = [str(ROOT / "tests" / "balancing" / "balance_worker.py"), str(folder), str(accumulate)]
        for status, output in run_ranks(command, world):
            assert status == 0, output
    return {path.stem: torch.load(path) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("method", BALANCING)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_train_as_one(method: str, accumulate: int, results: dict[str, dict[str, Any]]) -> None:
    whole = results["world1_rank0_accumulate1"][method]
    first, second = (results[f"world2_rank{rank}_accumulate{accumulate}"][method] for rank in (0, 1))
    assert first["weights"] == second["weights"]
    for name, tensor in first["balancer"].items():
        if isinstance(tensor, torch.Tensor):
            torch.testing.assert_close(tensor, second["balancer"][name], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(tensor, whole["balancer"][name], rtol=0, atol=1e-9, equal_nan=True)
    for name, tensor in whole["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        assert (first["model"][name] - tensor).abs().max() <= 1e-9, name


@pytest.mark.parametrize("method", BALANCING)
def test_methods_train_differently(method: str, results: dict[str, dict[str, Any]]) -> None:
    found, plain = (results["world1_rank0_accumulate1"][name]["weights"] for name in (method, "sum"))
    assert all(row["depth/regression"] == 0.5 and row["semantic/ce"] == 1.0 for row in plain)
    assert method == "sum" or sum(row != one for row, one in zip(found, plain)) >= 3


@pytest.mark.parametrize("method", BALANCING)
@pytest.mark.parametrize("precision", [torch.bfloat16, torch.float16])
def test_half_precision_stays_near_single(method: str, precision: torch.dtype, toy: Toy) -> None:
    need_tasks(*TASKS)
    bench = Bench(toy)
    expected = bench.train(method, ALONE, dtype=torch.float32)["weights"]
    found = bench.train(method, ALONE, dtype=torch.float32, precision=precision)["weights"]
    for row, near in zip(found[:2], expected):  # later ones magnify what rounding did to the network
        assert row == pytest.approx(near, rel=0.15)
    assert all(0 < value < 1e3 for row in found for value in row.values())
