"""Lengths in epochs become iterations, by hand-made numbers."""

from __future__ import annotations

import math

import pytest
from omegaconf import OmegaConf

from mtl_rcnn.config import compose
from mtl_rcnn.config.durations import in_iterations, is_epochs
from mtl_rcnn.errors import ConfigError

UNUSED = {"warmup_iters": 0, "checkpoint_period": 0, "log_period": 1}


@pytest.mark.parametrize(
    ("images", "batch", "given", "expected"),
    [
        (100, 16, {"max_iter": "12ep", "steps": ["8ep", 0.9, 70], "eval_period": "1ep"}, (75, [50, 0.9, 70], 7)),
        (1000, 10, {"max_iter": "0.3ep", "steps": [], "eval_period": 0}, (30, [], 0)),
        (6, 2, {"max_iter": 4, "steps": [3], "eval_period": "0.1ep"}, (4, [3], 1)),
        (117266, 16, {"max_iter": "12ep", "steps": ["11ep"], "eval_period": 5000}, (87950, [80621], 5000)),
    ],
)
def test_epochs_become_iterations(images: int, batch: int, given: dict, expected: tuple) -> None:
    cfg = OmegaConf.create({"solver": {"batch_size": batch, **UNUSED, **given}, "checkpoint": {"keep_every": "0.5ep"}})
    found = in_iterations(cfg, images)
    assert found.checkpoint.keep_every == math.ceil(images / batch / 2)
    solver = found.solver
    assert (solver.max_iter, list(solver.steps), solver.eval_period) == expected
    assert cfg.solver.max_iter == given["max_iter"]


def test_what_counts_as_epochs() -> None:
    assert all(is_epochs(value) for value in ("1ep", "12ep", "0.5ep"))
    assert not any(is_epochs(value) for value in ("0ep", "12", "ep", "-1ep", "1 ep", 12, 0.5, None))


def test_a_length_that_is_none_names_the_key() -> None:
    with pytest.raises(ConfigError, match=r"solver\.max_iter=0ep: expected a whole number of at least 1, or epochs"):
        compose("train", ["data.root=x", "solver.max_iter=0ep"])
    with pytest.raises(
        ConfigError, match=r"solver\.eval_period=1epoch: expected a whole number of at least 0, or epochs"
    ):
        compose("train", ["data.root=x", "solver.eval_period=1epoch"])
    with pytest.raises(ConfigError, match=r"solver\.steps: '8eps' is neither"):
        compose("train", ["data.root=x", "solver.steps=[8eps]"])
    assert (
        compose("train", ["data.root=x", "solver.max_iter=12ep", "solver.steps=[8ep,11ep]"]).solver.max_iter == "12ep"
    )
