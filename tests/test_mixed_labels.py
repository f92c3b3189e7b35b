"""Data sets that label different things train together on two gloo ranks, however they are dealt to the ranks: without
a search for unused parameters, without losing an image, and every task as it would with its own data alone."""

from __future__ import annotations

from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from mixed_data import KINDS, TASKS
from mixed_worker import arrangements
from ranks import ROOT, run_ranks
from toy import SIZES, write_toy


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What rank 0 and rank 1 wrote."""
    folder = tmp_path_factory.mktemp("mixed")
    toy = write_toy(folder / "toy")
    for status, output in run_ranks([str(ROOT / "tests" / "mixed_worker.py"), str(toy.root), str(folder)], 2):
        assert status == 0, output
    return [torch.load(folder / f"rank{rank}.pt", weights_only=False) for rank in range(2)]


def test_there_is_every_arrangement() -> None:
    found, number = set(arrangements()), len(KINDS)
    for one in KINDS:
        for other in KINDS:
            assert {((one,), (other,)), ((other,), (one,))} & found
    assert {((one, one), tuple(k for k in KINDS if k != one)) for one in KINDS} <= found
    dealt = {frozenset(part) for pair in found for part in pair if len({*pair[0], *pair[1]}) == number}
    assert all(frozenset(part) in dealt for part in combinations(KINDS, number // 2))


def test_no_image_is_lost(results: list[dict[str, Any]]) -> None:
    seen, values = results[0]["seen"], results[0]["values"]
    assert len(values) + len(results[0]["arrangements"]) >= 50
    assert all(np.isfinite(list(losses.values())).all() for losses in values)
    assert values == results[1]["values"]
    assert sum(seen.values()) == 4 * len(values)
    assert {*seen} == {(kind, image) for kind in KINDS for image in SIZES}
    for kind in KINDS:
        counts = [number for (name, _), number in seen.items() if name == kind]
        assert max(counts) - min(counts) <= 2  # the last batch ends in the midst of an epoch and of a window


def test_every_task_has_losses_in_every_arrangement_that_labels_it(results: list[dict[str, Any]]) -> None:
    for arrangement, result in results[0]["arrangements"].items():
        assert result["values"] == results[1]["arrangements"][arrangement]["values"]
        for task in TASKS:
            own = [value for name, value in result["values"].items() if name.startswith(f"{task}/")]
            labelled = any(task in KINDS[kind].tasks for part in arrangement for kind in part)
            assert own
            assert any(value > 0 for value in own) <= labelled


@pytest.mark.parametrize("arrangement", arrangements(), ids=lambda pair: " | ".join("+".join(part) for part in pair))
def test_each_tasks_loss_is_that_of_its_own_data_alone(arrangement: Any, results: list[dict[str, Any]]) -> None:
    result = results[0]["arrangements"][arrangement]
    assert result["values"] == pytest.approx(result["expected"], rel=1e-6, abs=1e-9)


def test_both_ranks_hold_the_same_network(results: list[dict[str, Any]]) -> None:
    for name, tensor in results[0]["model"].items():
        assert torch.equal(tensor, results[1]["model"][name]), name
