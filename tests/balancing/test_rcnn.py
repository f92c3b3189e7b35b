"""Balancing the losses of a real R-CNN: on two ranks every step has the samples, and every rank the weights, of one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ranks import ROOT, run_ranks
from rcnn_worker import METHODS, STEPS, TASKS
from tiny import need_tasks

pytestmark = pytest.mark.slow  # not run once more for each task that is left out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, list[dict[str, Any]]]]:
    """Of one rank, of rank 0 of two, and of rank 1 of two."""
    need_tasks(*TASKS)
    folder = tmp_path_factory.mktemp("rcnn")
    for world in (1, 2):
        for status, output in run_ranks([str(ROOT / "tests" / "balancing" / "rcnn_worker.py"), str(folder)], world):
            assert status == 0, output
    return [torch.load(folder / f"{name}.pt") for name in ("world1_rank0", "world2_rank0", "world2_rank1")]


@pytest.mark.parametrize("method", METHODS)
def test_the_samples_of_a_step_do_not_depend_on_the_ranks(method: str, results: list[dict[str, Any]]) -> None:
    one, first, second = (result[method] for result in results)
    assert [step["samples"] for step in one] == [a["samples"] + b["samples"] for a, b in zip(first, second)]
    assert len({sample for step in one for sample in step["samples"]}) == 4 * STEPS


@pytest.mark.parametrize("method", METHODS)
def test_every_rank_has_the_weights_of_one_process(method: str, results: list[dict[str, Any]]) -> None:
    one, first, second = (result[method] for result in results)
    for alone, own, other in zip(one, first, second, strict=True):
        assert own["scalars"] == other["scalars"]
        assert own["scalars"] == pytest.approx(alone["scalars"], rel=1e-9, abs=1e-9)
        for name, value in alone["state"].items():
            torch.testing.assert_close(own["state"][name], other["state"][name], rtol=0, atol=0, equal_nan=True)
            torch.testing.assert_close(own["state"][name], value, rtol=0, atol=1e-9, equal_nan=True)
    weights = [{name: value for name, value in step["scalars"].items() if name.startswith("weight/")} for step in one]
    assert {name.split("/")[1] for name in weights[0]} == set(TASKS)
    assert any(abs(value - 1) > 1e-3 for step in weights for value in step.values())


def test_the_losses_are_those_of_boxes_masks_and_keypoints(results: list[dict[str, Any]]) -> None:
    scalars = [step["scalars"] for step in results[0]["upgrad"]]
    losses = {name for name in scalars[0] if not name.startswith("weight/")}
    assert {name.split("/")[0] for name in losses} == set(TASKS)
    assert all(any(step[name] > 0 for step in scalars) for name in losses)
