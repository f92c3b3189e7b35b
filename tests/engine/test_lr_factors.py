"""AdamW follows its formula; parts and layers learn at their own factor of the schedule's rate."""

from __future__ import annotations

import copy

import pytest
import torch
from test_schedule import SOLVER
from tiny import tiny_model
from torch import nn

from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer, load_optimizer
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

PLAIN = {**SOLVER, "momentum": 0.0, "weight_decay": 0.0, "warmup_iters": 0}


@pytest.fixture(scope="module")
def network() -> MultiTaskRCNN:
    return tiny_model(["detection"])


def _rates(network: MultiTaskRCNN, solver: dict, iteration: int = 0) -> dict[str, float]:
    """Parameter name -> how far a step of size 1 gradients moves it, found by making that step."""
    moved = copy.deepcopy(network)
    optimizer = build_optimizer(moved, solver)
    LrSchedule.from_config(solver).apply(optimizer, iteration)
    for p in moved.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    after = dict(moved.named_parameters())
    return {name: float((p - after[name]).detach().double().mean()) for name, p in network.named_parameters()}


def test_adamw_follows_its_formula() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4)).double()
    solver = {**SOLVER, "optimizer": "adamw", "lr": 0.1, "weight_decay": 0.05, "betas": [0.8, 0.95], "eps": 1e-3}
    optimizer, schedule = build_optimizer(net, solver), LrSchedule.from_config(solver)
    expected = {name: p.detach().clone() for name, p in net.named_parameters()}
    first, second = ({name: torch.zeros_like(p) for name, p in expected.items()} for _ in range(2))
    for t in range(1, 6):
        lr = schedule.apply(optimizer, t - 1)
        for name, p in net.named_parameters():
            g = p.grad = torch.randn_like(p)
            first[name] = 0.8 * first[name] + 0.2 * g
            second[name] = 0.95 * second[name] + 0.05 * g**2
            decay = 0.0 if name.startswith("1.") else 0.05  # the layer norm has weight_decay_norm
            ratio = first[name] / (1 - 0.8**t) / ((second[name] / (1 - 0.95**t)).sqrt() + 1e-3)
            expected[name] = expected[name] * (1 - lr * decay) - lr * ratio
        optimizer.step()
    for name, p in net.named_parameters():
        torch.testing.assert_close(p.detach(), expected[name], rtol=1e-12, atol=1e-14)


def test_parts_learn_at_their_own_rate_through_the_whole_schedule(network: MultiTaskRCNN) -> None:
    solver = {**PLAIN, "lr_factors": {"trunk": 0.1, "detection": 2.0}}
    for iteration, base in ((0, 0.02), (40, 0.002), (55, 0.0002)):
        for name, rate in _rates(network, solver, iteration).items():
            factor = 0.1 if name.startswith("backbone.") else 2.0
            assert rate == pytest.approx(base * factor, rel=1e-2), name  # weights are float32


def test_a_pattern_counts_more_than_a_part_and_the_last_of_several(network: MultiTaskRCNN) -> None:
    factors = {"backbone.fpn_*": 3.0, "*.fpn_output[23].*": 5.0, "trunk": 0.5, "*.res5.*": 0.25, "*.bias": 1.0}
    rates = _rates(network, {**PLAIN, "lr": 1.0, "lr_factors": factors, "layer_decay": 0.5})
    depths = {"stem": 5, "res2": 4, "res3": 3, "res4": 2, "res5": 1}
    for name, rate in rates.items():
        words = name.split(".")
        factor = 0.5 if words[0] == "backbone" else 1.0
        if words[1].startswith("fpn_"):
            factor = 5.0 if words[1] in ("fpn_output2", "fpn_output3") else 3.0
        if "res5" in words:
            factor = 0.25
        if words[-1] == "bias":
            factor = 1.0
        decay = 0.5 ** depths[words[2]] if words[1] == "bottom_up" else 1.0
        assert rate == pytest.approx(factor * decay, rel=1e-4), name


def test_layers_of_the_trunk_learn_slower_towards_the_image(network: MultiTaskRCNN) -> None:
    rates = _rates(network, {**PLAIN, "lr": 1.0, "layer_decay": 0.5, "lr_factors": {"trunk": 0.4}})
    powers = {"stem": 5, "res2": 4, "res3": 3, "res4": 2, "res5": 1}
    assert {name.split(".")[2] for name in rates if name.startswith("backbone.bottom_up.")} == set(powers)
    for name, rate in rates.items():
        factor = 1.0
        if name.startswith("backbone.bottom_up."):
            factor = 0.4 * 0.5 ** powers[name.split(".")[2]]
        elif name.startswith("backbone."):
            factor = 0.4
        assert rate == pytest.approx(factor, rel=1e-4), name


def test_each_parameter_is_in_one_group_whose_decay_is_its_own(network: MultiTaskRCNN) -> None:
    optimizer = build_optimizer(network, {**SOLVER, "layer_decay": 0.9})
    ids = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(ids) == sorted(id(p) for p in network.parameters())
    for group in optimizer.param_groups:
        assert group["weight_decay"] == (0.0 if all(".norm." in name for name in group["param_names"]) else 1e-4)
    plain = build_optimizer(network, SOLVER)
    assert [group["lr_factor"] for group in plain.param_groups] == [1.0, 1.0]
    assert [group["weight_decay"] for group in plain.param_groups] == [1e-4, 0.0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lr_factors": {"detektion": 2.0}}, "no part 'detektion'; did you mean 'detection'"),
        ({"lr_factors": {"trunk": -1}}, r"solver\.lr_factors\.trunk=-1"),
        ({"layer_decay": 0}, r"solver\.layer_decay=0"),
    ],
)
def test_a_wrong_factor_names_the_key(network: MultiTaskRCNN, change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(network, {**SOLVER, **change})


def test_an_optimizer_resumes_from_its_own_kind_and_with_the_factors_of_the_configuration() -> None:
    net = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4))
    sgd = build_optimizer(net, SOLVER)
    state = copy.deepcopy(sgd.state_dict())
    for group in state["param_groups"]:
        del group["lr_factor"]  # as older checkpoints are
    load_optimizer(sgd, state, "model.pth")
    assert [group["lr_factor"] for group in sgd.param_groups] == [1.0, 1.0]
    with pytest.raises(CheckpointError, match=r"model\.pth: holds the state of sgd, .*solver\.optimizer=adamw"):
        load_optimizer(build_optimizer(net, {**SOLVER, "optimizer": "adamw"}), state, "model.pth")
