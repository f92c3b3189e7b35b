"""The optimizer, and the learning rate as a pure function of the iteration (so that nothing needs resuming)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn.engine.lr_factors import lr_factors
from mtl_rcnn.errors import CheckpointError, ConfigError

__all__ = [
    "OPTIMIZERS",
    "SCHEDULES",
    "LrSchedule",
    "build_optimizer",
    "clip_gradients",
    "effective_lr",
    "load_optimizer",
]

SCHEDULES = ("multistep", "cosine")
OPTIMIZERS = ("sgd", "adamw")
_NORMS = (
    nn.modules.batchnorm._BatchNorm,
    nn.modules.instancenorm._InstanceNorm,
    nn.GroupNorm,
    nn.LayerNorm,
    nn.LocalResponseNorm,
)


@dataclass(frozen=True)
class LrSchedule:
    """Learning rate by iteration: warm-up, then multi-step or cosine; the values of Detectron2's schedulers.

    With s(t) = gamma^(number of steps <= t) or 0.5 (1 + cos(pi t / max_iter)), the learning rate is lr * s(t) from
    t = warmup_iters on, and before that lr * (a line from warmup_factor * s(0) at 0 to s(warmup_iters)).
    A warm-up longer than the training keeps its slope and is cut off.

    Attributes:
        lr: the base learning rate.
        max_iter: number of iterations of the whole training.
        name: one of `SCHEDULES`.
        steps: iterations at which the rate is multiplied by `gamma`, increasing, in (0, max_iter).
        warmup_iters, warmup_factor: see above.
    """

    lr: float
    max_iter: int
    name: str = "multistep"
    steps: tuple[int, ...] = ()
    gamma: float = 0.1
    warmup_iters: int = 0
    warmup_factor: float = 0.001

    @staticmethod
    def from_config(solver: Mapping[str, Any]) -> LrSchedule:
        """Reads the `solver` node, whose lengths are iterations. Raises ConfigError naming the key."""
        _check_positive(solver, "lr", "max_iter")
        if solver["schedule"] not in SCHEDULES:
            raise ConfigError(f"solver.schedule: expected one of {', '.join(SCHEDULES)}, got {solver['schedule']!r}")
        if solver["warmup_iters"] < 0 or not 0 <= solver["warmup_factor"] <= 1:
            raise ConfigError(
                "solver.warmup_iters must be >= 0 and solver.warmup_factor in [0, 1], "
                f"got {solver['warmup_iters']} and {solver['warmup_factor']}"
            )
        return LrSchedule(
            lr=effective_lr(solver),
            max_iter=int(solver["max_iter"]),
            name=solver["schedule"],
            steps=_steps(solver["steps"] or (), int(solver["max_iter"])) if solver["schedule"] == "multistep" else (),
            gamma=float(solver["gamma"]),
            warmup_iters=int(solver["warmup_iters"]),
            warmup_factor=float(solver["warmup_factor"]),
        )

    def at(self, iteration: int) -> float:
        """Learning rate of step `iteration`, counted from 0: before it, `iteration` steps are done."""
        return self.lr * self._factor(iteration)

    def apply(self, optimizer: torch.optim.Optimizer, iteration: int) -> float:
        """Sets the learning rate of step `iteration`, times its own `lr_factor`, in every parameter group; returns
        it, without a factor."""
        lr = self.at(iteration)
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_factor", 1.0)
        return lr

    def _factor(self, iteration: int) -> float:
        if iteration >= self.warmup_iters:
            return self._shape(iteration)
        start, end = self.warmup_factor * self._shape(0), self._shape(self.warmup_iters)
        return start + (end - start) * iteration / self.warmup_iters

    def _shape(self, iteration: int) -> float:
        if self.name == "cosine":
            return 0.5 * (1.0 + math.cos(math.pi * min(iteration, self.max_iter) / self.max_iter))
        return self.gamma ** bisect_right(self.steps, iteration)


def effective_lr(solver: Mapping[str, Any]) -> float:
    """`solver.lr`, in proportion to the batch where `solver.reference_batch_size` says for which batch it is meant
    (the linear scaling rule of Goyal et al., Accurate, Large Minibatch SGD, 2017)."""
    reference = solver["reference_batch_size"]
    return float(solver["lr"]) * (1.0 if reference is None else solver["batch_size"] / reference)


def build_optimizer(model: nn.Module, solver: Mapping[str, Any]) -> torch.optim.Optimizer:
    """SGD or AdamW over every trainable parameter, each once, frozen ones left out.

    Normalisation layers have their own `solver.weight_decay_norm` (null: the common `solver.weight_decay`). Groups, for
    each factor of the learning rate (`lr_factors`) at most two, are in the model's order and hold the parameters'
    names, which `load_optimizer` compares, and `lr_factor`, which `LrSchedule.apply` multiplies with.

    AdamW (Loshchilov and Hutter, Decoupled Weight Decay Regularization, 2019) is PyTorch's: with g the gradient and t
    the step from 1, m = b1 m + (1 - b1) g; v = b2 v + (1 - b2) g^2;
    w <- (1 - lr weight_decay) w - lr m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps).

    Raises:
        ConfigError: a value out of range, or a model without trainable parameters.
    """
    _check_solver(solver)
    groups = _groups(model, solver)
    if not groups:
        raise ConfigError("the model has no trainable parameter: something in the configuration freezes all of it")
    lr = effective_lr(solver)
    if solver["optimizer"] == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=tuple(solver["betas"]), eps=solver["eps"])
    return torch.optim.SGD(groups, lr=lr, momentum=solver["momentum"], nesterov=solver["nesterov"])


def load_optimizer(optimizer: torch.optim.Optimizer, state: Mapping[str, Any], source: str) -> None:
    """Loads a checkpoint's optimizer state.

    Raises:
        CheckpointError: it belongs to other parameters, or to the same ones in another order, where PyTorch would
            silently mix up their momenta; or to another kind of optimizer.
    """
    theirs, ours = _kind(state), _kind(optimizer.state_dict())
    if theirs != ours:
        raise CheckpointError(
            f"{source}: holds the state of {theirs}, this run has solver.optimizer={ours}; resume with "
            f"solver.optimizer={theirs}, or start anew from its weights with checkpoint.weights=<file>"
        )
    ours = [group["param_names"] for group in optimizer.state_dict()["param_groups"]]
    theirs = [group.get("param_names") for group in state["param_groups"]]
    if ours != theirs:
        found, expected = ([name for group in groups for name in group or ()] for groups in (theirs, ours))
        differing = sorted(set(found) ^ set(expected))
        what = f"not in both: {', '.join(differing[:10])}" if differing else "the same ones, ordered otherwise"
        raise CheckpointError(
            f"{source}: its optimizer trains {len(found)} parameters, this run {len(expected)} ({what}); "
            "resume with the checkpoint's configuration, or start anew from its weights with checkpoint.weights=<file>"
        )
    factors = [group.get("lr_factor", 1.0) for group in optimizer.param_groups]
    optimizer.load_state_dict(dict(state))
    for group, factor in zip(optimizer.param_groups, factors):
        group["lr_factor"] = factor  # of the configuration, like the learning rate; older files have none


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """Scales all gradients so that their joint 2-norm is at most `max_norm` (None: leaves them).

    Returns:
        () the norm before scaling; zero without gradients. Not finite if a gradient is not: then so are the gradients.
    """
    parameters = [p for p in parameters if p.grad is not None]
    if max_norm is None:
        return nn.utils.get_total_norm([p.grad for p in parameters])
    return nn.utils.clip_grad_norm_(parameters, max_norm)


def _groups(model: nn.Module, solver: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Parameter groups by factor of the learning rate, each first without and then with the normalisation layers'."""
    layers = [module for module in model.modules() if isinstance(module, _NORMS)]
    norms = {id(p) for layer in layers for p in layer.parameters(recurse=False)}
    factors = lr_factors(model, solver)
    decay, decay_norm = solver["weight_decay"], solver["weight_decay_norm"]
    members: dict[tuple[float, bool], list[tuple[str, nn.Parameter]]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:
            factor = factors.get(id(p), 1.0)
            for is_norm in (False, True):
                members.setdefault((factor, is_norm), [])
            members[factor, id(p) in norms].append((name, p))
    return [
        {"params": params, "weight_decay": decay_norm if is_norm and decay_norm is not None else decay, "lr_factor": f}
        for (f, is_norm), params in members.items()
        if params
    ]


def _kind(state: Mapping[str, Any]) -> str:
    return "adamw" if "betas" in state["param_groups"][0] else "sgd"


def _steps(steps: Sequence[int | float], max_iter: int) -> tuple[int, ...]:
    found = tuple(_step(step, max_iter) for step in steps)
    if list(found) != sorted(found):
        raise ConfigError(f"solver.steps: {list(steps)} (iterations {list(found)}) must increase")
    return found


def _step(step: int | float, max_iter: int) -> int:
    if isinstance(step, float) and 0 < step < 1:
        return max(1, round(step * max_iter))
    if isinstance(step, bool) or not isinstance(step, int) or step < 1:
        raise ConfigError(
            f"solver.steps: {step!r} is neither an iteration (1, 2, ...) nor a fraction of max_iter in (0, 1)"
        )
    if step >= max_iter:
        raise ConfigError(
            f"solver.steps: {step} is not before the end, solver.max_iter={max_iter}; "
            "lower it, or give fractions of max_iter such as [0.67, 0.89]"
        )
    return step


def _check_solver(solver: Mapping[str, Any]) -> None:
    _check_positive(solver, "lr", "eps")
    if solver["optimizer"] not in OPTIMIZERS:
        raise ConfigError(f"solver.optimizer: expected one of {', '.join(OPTIMIZERS)}, got {solver['optimizer']!r}")
    if len(solver["betas"]) != 2 or not all(0 <= beta < 1 for beta in solver["betas"]):
        raise ConfigError(f"solver.betas: expected two numbers in [0, 1), got {list(solver['betas'])}")
    if not 0 <= solver["momentum"] < 1:
        raise ConfigError(f"solver.momentum: expected a number in [0, 1), got {solver['momentum']}")
    if solver["nesterov"] and solver["momentum"] == 0:
        raise ConfigError("solver.nesterov needs solver.momentum > 0")
    for key in ("weight_decay", "weight_decay_norm"):
        if solver[key] is not None and solver[key] < 0:
            raise ConfigError(f"solver.{key}: expected a number >= 0, got {solver[key]}")


def _check_positive(solver: Mapping[str, Any], *keys: str) -> None:
    for key in keys:
        if not (isinstance(solver[key], int | float) and solver[key] > 0):
            raise ConfigError(f"solver.{key}: expected a number > 0, got {solver[key]!r}")
