"""Learning rates equal Detectron2's; the optimizer holds every trainable parameter once; wrong values are named."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultTrainer
from detectron2.solver import build_lr_scheduler
from torch import nn

from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer, clip_gradients, load_optimizer
from mtl_rcnn.errors import CheckpointError, ConfigError

SOLVER = {
    "batch_size": 16,
    "reference_batch_size": None,
    "lr": 0.02,
    "max_iter": 60,
    "optimizer": "sgd",
    "momentum": 0.9,
    "betas": [0.9, 0.999],
    "eps": 1e-8,
    "lr_factors": {},
    "layer_decay": None,
    "nesterov": False,
    "weight_decay": 1e-4,
    "weight_decay_norm": 0.0,
    "schedule": "multistep",
    "steps": [40, 55],
    "gamma": 0.1,
    "warmup_iters": 10,
    "warmup_factor": 0.001,
}


def _detectron2_rates(name: str, solver: dict) -> list[float]:
    cfg = get_cfg()
    cfg.SOLVER.LR_SCHEDULER_NAME = name
    cfg.SOLVER.MAX_ITER, cfg.SOLVER.STEPS, cfg.SOLVER.GAMMA = solver["max_iter"], solver["steps"], solver["gamma"]
    cfg.SOLVER.WARMUP_ITERS, cfg.SOLVER.WARMUP_FACTOR = solver["warmup_iters"], solver["warmup_factor"]
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=solver["lr"])
    scheduler = build_lr_scheduler(cfg, optimizer)
    rates = []
    for _ in range(solver["max_iter"]):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("ours", "theirs", "change"),
    [
        ("multistep", "WarmupMultiStepLR", {}),
        ("multistep", "WarmupMultiStepLR", {"steps": [5, 30]}),  # a step inside the warm-up
        ("multistep", "WarmupMultiStepLR", {"warmup_iters": 0}),
        ("cosine", "WarmupCosineLR", {}),
    ],
)
def test_rates_parity_with_detectron2(ours: str, theirs: str, change: dict) -> None:
    solver = {**SOLVER, "schedule": ours, **change}
    schedule = LrSchedule.from_config(solver)
    rates = [schedule.at(iteration) for iteration in range(60)]
    assert rates == pytest.approx(_detectron2_rates(theirs, solver), rel=1e-9, abs=1e-15)
    assert len(set(rates)) > 2


def test_rate_is_a_function_of_the_iteration_alone() -> None:
    schedule = LrSchedule.from_config(SOLVER)
    optimizer = build_optimizer(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), SOLVER)
    for iteration in (50, 3, 59, 3):
        assert schedule.apply(optimizer, iteration) == schedule.at(iteration)
        assert {group["lr"] for group in optimizer.param_groups} == {schedule.at(iteration)}
    assert schedule.at(39) == 0.02
    assert schedule.at(40) == pytest.approx(0.002)


def test_fractions_are_of_max_iter() -> None:
    assert LrSchedule.from_config({**SOLVER, "max_iter": 90000, "steps": [2 / 3, 8 / 9]}).steps == (60000, 80000)
    assert LrSchedule.from_config({**SOLVER, "max_iter": 1, "steps": [0.1, 0.9]}).steps == (1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"steps": [40, 600]}, r"solver\.steps: 600 .*solver\.max_iter=60"),
        ({"steps": [50, 40]}, r"solver\.steps: \[50, 40\].*increase"),
        ({"steps": [1.5]}, r"solver\.steps: 1\.5 is neither"),
        ({"steps": [0]}, r"solver\.steps: 0 is neither"),
        ({"schedule": "polynomial"}, r"solver\.schedule: expected one of multistep, cosine, got 'polynomial'"),
        ({"lr": 0}, r"solver\.lr"),
        ({"max_iter": None}, r"solver\.max_iter"),
        ({"warmup_factor": 2}, r"solver\.warmup_factor"),
    ],
)
def test_wrong_schedule_names_the_key(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        LrSchedule.from_config({**SOLVER, **change})


def test_the_rate_scales_with_the_batch_as_in_detectron2() -> None:
    cfg = get_cfg()
    cfg.SOLVER.REFERENCE_WORLD_SIZE, cfg.SOLVER.IMS_PER_BATCH, cfg.SOLVER.BASE_LR = 8, 16, 0.02
    scaled = DefaultTrainer.auto_scale_workers(cfg, 2)
    solver = {**SOLVER, "batch_size": scaled.SOLVER.IMS_PER_BATCH, "reference_batch_size": 16}
    assert LrSchedule.from_config(solver).lr == scaled.SOLVER.BASE_LR == 0.005
    assert build_optimizer(_Net(), solver).param_groups[0]["lr"] == 0.005
    assert LrSchedule.from_config({**solver, "reference_batch_size": None}).lr == 0.02


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.group = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.GroupNorm(2, 4)
        self.shared = self.conv  # one module under two names
        self.frozen = nn.Linear(4, 4).requires_grad_(False)


def test_every_trainable_parameter_once() -> None:
    net = _Net()
    optimizer = build_optimizer(net, SOLVER)
    decays = {id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    expected = {id(p): 1e-4 for p in net.conv.parameters()}
    expected |= {id(p): 0.0 for layer in (net.norm, net.group) for p in layer.parameters()}
    assert decays == expected
    assert sum(len(group["params"]) for group in optimizer.param_groups) == 6
    same = build_optimizer(net, {**SOLVER, "weight_decay_norm": None})
    assert {group["weight_decay"] for group in same.param_groups} == {1e-4}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"momentum": 1.0}, r"solver\.momentum"),
        ({"momentum": 0, "nesterov": True}, r"solver\.nesterov"),
        ({"weight_decay": -1}, r"solver\.weight_decay:"),
        ({"weight_decay_norm": -1}, r"solver\.weight_decay_norm"),
        ({"optimizer": "adam"}, r"solver\.optimizer: expected one of sgd, adamw, got 'adam'"),
        ({"betas": [0.9]}, r"solver\.betas: expected two numbers"),
        ({"betas": [0.9, 1.0]}, r"solver\.betas: expected two numbers"),
        ({"eps": 0}, r"solver\.eps"),
    ],
)
def test_wrong_solver_names_the_key(change: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_optimizer(_Net(), {**SOLVER, **change})


def test_all_frozen_is_an_error() -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        build_optimizer(_Net().requires_grad_(False), SOLVER)


def _step(net: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()
    net(torch.ones(2, 3)).square().sum().backward()
    optimizer.step()


def test_optimizer_state_resumes_bit_for_bit() -> None:
    torch.manual_seed(0)
    nets = [nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Linear(4, 1)) for _ in range(2)]
    first, second = (build_optimizer(net, SOLVER) for net in nets)
    _step(nets[0], first)
    nets[1].load_state_dict(nets[0].state_dict())
    load_optimizer(second, copy.deepcopy(first.state_dict()), "model_0000001.pth")
    for net, optimizer in zip(nets, (first, second)):
        _step(net, optimizer)
    assert all(torch.equal(a, b) for a, b in zip(nets[0].parameters(), nets[1].parameters()))


def test_optimizer_state_of_other_parameters_is_refused() -> None:
    one, other = nn.Sequential(nn.Linear(3, 3)), nn.Sequential(nn.Flatten(), nn.Linear(3, 3))
    state = build_optimizer(one, SOLVER).state_dict()
    with pytest.raises(CheckpointError, match=r"model\.pth: .*not in both: 0\.bias, 0\.weight, 1\.bias, 1\.weight"):
        load_optimizer(build_optimizer(other, SOLVER), state, "model.pth")


def test_clip_gradients() -> None:
    parameters = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1))]
    parameters[0].grad, parameters[1].grad = torch.tensor([3.0, 0.0]), torch.tensor([4.0])
    assert clip_gradients(parameters, None) == 5
    assert torch.equal(parameters[1].grad, torch.tensor([4.0]))
    assert clip_gradients(iter(parameters), 1.0) == 5
    assert clip_gradients(parameters, 1.0) == pytest.approx(1.0, abs=1e-5)
    assert clip_gradients([], 1.0) == 0
    parameters[1].grad.fill_(math.nan)
    assert not torch.isfinite(clip_gradients(parameters, 1.0))
