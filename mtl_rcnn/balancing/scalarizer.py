"""What turns the losses of all tasks into the scalar that is minimised."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn.errors import ConfigError


class Scalarizer(nn.Module):
    """A function of the tasks' losses over the global batch. A method is a subclass that says `scalar`.

    A task's loss is the sum of its parts, each times its fixed weight. Every rank computes the same scalar from the
    same global losses, and back-propagates its own losses times the scalar's derivatives (docs/adr/0015): so no rank
    can differ, a method need not be linear, and accumulation, autocast and DDP are none of its business.

    Args:
        parts: all loss names, "task/part".
        weights: weight of a whole task ("task") or of one part ("task/part", which multiplies the task's); None for
            none.

    Raises:
        ConfigError: a weight of something that is not a loss, or that is negative.
    """

    adaptive = True
    """Whether weights depend on anything but the configuration."""

    looks_ahead = False
    """Whether it is to see the gradients of all micro-batches before any goes into the trunk."""

    def __init__(self, parts: Sequence[str], weights: Mapping[str, float] | None = None) -> None:
        super().__init__()
        self.parts = tuple(parts)
        self.tasks = tuple(dict.fromkeys(part.split("/")[0] for part in parts))
        self._given = _fixed_weights(self.parts, self.tasks, weights or {})
        self.fixed = dict(self._given)
        self._factors = dict(self.fixed)

    def scale(self, factors: Mapping[str, float]) -> None:
        """Sets the fixed weights to those given, times a factor of each task (1 where there is none)."""
        self.fixed = {part: weight * factors.get(part.split("/")[0], 1.0) for part, weight in self._given.items()}

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The scalar to minimise, float64.

        Args:
            losses: task -> float64 scalar, the task's loss over the global batch. Only tasks that some image of the
                batch is labelled for: an absent task is not a task with loss 0. At least one.
        """
        raise NotImplementedError

    def forward(self, losses: Mapping[str, Tensor], values: Mapping[str, float], valid: Mapping[str, bool]) -> Tensor:
        """What this rank back-propagates.

        Args:
            losses: "task/part" -> scalar whose gradient, averaged over the ranks, is that of the global loss; 0 and
                connected to the graph for an absent task.
            values: "task/part" -> the loss over the global batch, the same on every rank.
            valid: task -> whether any image of the global batch is labelled for it.
        """
        self._factors = self._derivatives(values, valid)
        return torch.stack([losses[part] * self._factors[part] for part in self.parts]).sum()

    def weights(self) -> dict[str, float]:
        """What each part was multiplied with in the last step, the same on every rank."""
        return dict(self._factors)

    def scalars(self) -> dict[str, float]:
        """For the log: "weight/<task>", what the method multiplied each task's loss with in the last step, its fixed
        weights apart. {} of the plain sum, whose weights the configuration says."""
        ratios: dict[str, float] = {}
        for part, factor in self._factors.items():
            if self.adaptive and self.fixed[part] > 0:
                ratios[f"weight/{part.split('/')[0]}"] = factor / self.fixed[part]
        return ratios

    def step(self) -> None:
        """Ends a training step: what the method learns from it. Nothing by default."""

    @property
    def looks_again(self) -> bool:
        """Whether the step that just ended is to be followed by `seen_again`."""
        return False

    def seen_again(self, values: Mapping[str, float]) -> None:
        """The losses of the same batch with the network after the step, as `values` of `forward`."""
        raise NotImplementedError

    def _derivatives(self, values: Mapping[str, float], valid: Mapping[str, bool]) -> dict[str, float]:
        """d scalar / d loss of each part; the fixed weight for parts of absent tasks, whose losses are 0. Leaves the
        gradients of the method's own parameters."""
        for parameter in self.parameters():
            parameter.grad = None
        with torch.enable_grad(), torch.autocast("cpu", enabled=False):
            leaves = {part: torch.tensor(values[part], dtype=torch.float64, requires_grad=True) for part in self.parts}
            totals = self._totals(leaves, valid)
            if totals:
                self.scalar(totals).backward()
        given = {part: leaf.grad for part, leaf in leaves.items()}
        return {part: self.fixed[part] if grad is None else float(grad) for part, grad in given.items()}

    def _totals(self, losses: Mapping[str, Tensor], valid: Mapping[str, bool]) -> dict[str, Tensor]:
        totals: dict[str, Tensor] = {}
        for part in self.parts:
            task = part.split("/")[0]
            if valid[task]:
                weighted = losses[part] * self.fixed[part]
                totals[task] = totals[task] + weighted if task in totals else weighted
        return totals


class LearnedScalarizer(Scalarizer):
    """A scalarizer with one number per task that is learned beside the network, by an Adam of its own.

    The numbers are no parameters of the network's optimizer: its schedule, weight decay, clipping and loss scaling are
    meant for weights of layers. A number whose task is absent from the batch is left as it is.

    Args:
        parts, weights: see `Scalarizer`.
        start: first value of every number.
        lr: of Adam, constant.
        weight_decay: of Adam.
    """

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        start: float = 0.0,
        lr: float = 0.025,
        weight_decay: float = 0.0,
    ) -> None:
        super().__init__(parts, weights)
        self.numbers = nn.ParameterDict(
            {task: nn.Parameter(torch.tensor(start, dtype=torch.float64)) for task in self.tasks}
        )
        self.optimizer = OwnAdam(self.numbers.values(), lr, weight_decay)

    def step(self) -> None:
        """A step of Adam on the gradients that `forward` left."""
        self.optimizer.step()


class OwnAdam(nn.Module):
    """Adam for a method's own numbers, whose state is part of the method's.

    Args:
        numbers: what it updates.
        lr, weight_decay: of Adam, constant.
    """

    def __init__(self, numbers: Iterable[nn.Parameter], lr: float, weight_decay: float = 0.0) -> None:
        super().__init__()
        self.adam = torch.optim.Adam(numbers, lr=lr, weight_decay=weight_decay)

    def step(self) -> None:
        """Moves the numbers that have a gradient."""
        self.adam.step()

    def get_extra_state(self) -> dict[str, Any]:
        """The state of Adam, for checkpoints."""
        return self.adam.state_dict()

    def set_extra_state(self, state: Mapping[str, Any]) -> None:
        """Inverse of `get_extra_state`; rates are those of the configuration."""
        groups = self.adam.state_dict()["param_groups"]
        self.adam.load_state_dict({**state, "param_groups": groups})


def _fixed_weights(parts: Sequence[str], tasks: Sequence[str], weights: Mapping[str, float]) -> dict[str, float]:
    known = {*parts, *tasks}
    for name, weight in weights.items():
        if name not in known:
            close = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"losses are {', '.join(parts)}"
            raise ConfigError(f"balancing.weights: no loss '{name}'; {hint}")
        if weight < 0:
            raise ConfigError(f"balancing.weights.{name}={weight}: expected a number of at least 0")
    return {part: float(weights.get(part.split("/")[0], 1.0)) * float(weights.get(part, 1.0)) for part in parts}
