"""Two gloo ranks with two images each train as one rank with four, whatever is labelled where. No unused-parameter
search is needed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddp_worker import PATTERNS
from ranks import ROOT, run_ranks
from tiny import need_tasks

pytestmark = pytest.mark.slow  # not run once more for each task that is left out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one rank, of rank 0 of two, and of rank 1 of two."""
    need_tasks("detection", "mask", "keypoint")
    folder = tmp_path_factory.mktemp("ddp")
    for world in (1, 2):
        for status, output in run_ranks([str(ROOT / "tests" / "ddp_worker.py"), str(folder)], world):
            assert status == 0, output
    return [torch.load(folder / f"{name}.pt") for name in ("world1_rank0", "world2_rank0", "world2_rank1")]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_ranks_train_as_one(pattern: str, results: list[dict[str, Any]]) -> None:
    one, two, other = (result[pattern] for result in results)
    assert two["values"] == pytest.approx(one["values"], rel=1e-6, abs=1e-9)
    assert any(value > 0 for value in one["values"].values()) == (pattern != "no labels anywhere")
    for name, tensor in one["model"].items():
        assert torch.equal(two["model"][name], other["model"][name]), name
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-6, atol=1e-7, msg=name)
