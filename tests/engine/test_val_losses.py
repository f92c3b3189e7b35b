"""Validation losses are sums over counts of the whole set, and measuring them leaves no trace."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import equal
from test_train import TASKS, toy_config
from tiny import make_sample, need_tasks, tiny_model
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.val_losses import validation_losses
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.inference import EvaluationSet

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

NAMES = ("detection", "mask", "keypoint")


def _samples() -> list[Sample]:
    """Of three sizes; one without masks, one without any label."""
    labels = [{}, {"mask": False}, dict.fromkeys(NAMES, False)]
    none = torch.zeros(3, dtype=torch.bool)
    return [
        make_sample(
            seed,
            (64 + 32 * seed, 96),
            3,
            labelled=dict.fromkeys(NAMES, True) | has,
            **({"has_mask": none} if has.get("mask") is False else {}),
        )
        for seed, has in enumerate(labels)
    ]


def _set(samples: list[Sample]) -> EvaluationSet:
    return EvaluationSet("some", [], {}, [[sample] for sample in samples])


def test_they_are_the_sums_over_the_counts_of_the_set() -> None:
    need_tasks(*NAMES)
    model = tiny_model(NAMES)
    found = validation_losses(model, [_set(_samples())], seed=0)
    model.eval()
    expected: dict[str, float] = {}
    with torch.no_grad():
        single = [model.losses([sample])[0] for sample in _samples()]
    for name in model.loss_names():
        task, part = name.split("/")
        value = sum(float(losses[name][0]) for losses in single) / sum(float(losses[name][1]) for losses in single)
        expected[f"some/{task}/loss_{part}"] = value
        expected[f"some/{task}/loss"] = expected.get(f"some/{task}/loss", 0.0) + value
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(expected)
    assert not any(metric.higher_is_better for metric in found.values())
    assert min(expected.values()) > 0


def test_a_part_without_labels_has_no_value() -> None:
    need_tasks(*NAMES)
    found = validation_losses(tiny_model(NAMES), [_set(_samples()[1:2])], seed=0)
    assert "some/mask/loss" not in found
    assert "some/mask/loss_bce" not in found
    assert "some/detection/loss" in found


@pytest.mark.parametrize("sampling", ["keyed", "global"])
def test_they_repeat_and_leave_no_trace(sampling: str) -> None:
    need_tasks(*NAMES)
    model = tiny_model(NAMES, f"model.sampling={sampling}").train()
    model.backbone.bottom_up.stem.eval()
    modes = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    first = validation_losses(model, [_set(_samples())], seed=0)
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()  # noqa: NPY002
    assert torch.equal(states[0], after[0])
    assert states[1] == after[1]
    assert all(np.array_equal(one, two) for one, two in zip(states[2], after[2]))
    assert equal(dict(model.state_dict()), before)
    assert [module.training for module in model.modules()] == modes
    assert all(p.grad is None for p in model.parameters())
    torch.rand(1)
    assert validation_losses(model, [_set(_samples())], seed=0) == first


@pytest.mark.parametrize("sampling", ["keyed", "global"])
def test_a_run_with_them_is_bit_identical_to_one_without(sampling: str, toy: Toy, tmp_path: Path) -> None:
    folders = []
    for on in (False, True):
        torch.manual_seed(5)  # what global sampling draws from
        options = [f"solver.val_losses={on}", "solver.eval_period=1", f"model.sampling={sampling}"]
        folders.append(train(toy_config(toy, tmp_path / str(on), *options)).folder)
    without, with_them = (checkpoints.load(folder / "model_0000004.pth") for folder in folders)
    assert any("running_mean" in name for name in without["model"])
    for part in ("model", "optimizer", "best"):
        assert equal(without[part], with_them[part]), part
    rows = [row for row in read_metrics(folders[1] / "metrics.jsonl") if "toy/detection/AP" in row]
    assert len(rows) == 4
    assert all({f"toy/{task}/loss" for task in TASKS} <= set(row) for row in rows)
    plain = [row for row in read_metrics(folders[0] / "metrics.jsonl") if "toy/detection/AP" in row]
    assert plain == [{name: value for name, value in row.items() if "/loss" not in name} for row in rows]


def test_a_validation_loss_can_choose_the_best_network(toy: Toy, tmp_path: Path) -> None:
    options = ["solver.val_losses=true", "solver.eval_period=1", "solver.best_metric=toy/detection/loss"]
    folder = train(toy_config(toy, tmp_path / "run", *options, tasks=("detection",))).folder
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "toy/detection/loss" in row]
    best = min(rows, key=lambda row: row["toy/detection/loss"])
    state = checkpoints.load(folder / "model_best.pth")
    assert state["best"]["value"] == best["toy/detection/loss"]
    assert state["iteration"] == best["iteration"]


def test_without_an_evaluation_set_they_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"solver\.val_losses=true: there is no evaluation set.*data\.val"):
        compose("train", ["data.root=x", "data.val=[]", "solver.val_losses=true"])
