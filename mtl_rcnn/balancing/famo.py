"""Fast adaptive multitask optimisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import LearnedScalarizer
from mtl_rcnn.errors import ConfigError

LEAST = 1e-8
"""Added to a loss before its logarithm, as in the authors' code."""


class FAMO(LearnedScalarizer):
    """Decreases all log losses at the same rate (FAMO; Liu et al., arXiv 2306.03792, algorithm 1).

    Task i of the K tasks of the batch weighs K c z_i / L_i, z = softmax of learned logits, c = 1 / sum_i z_i / L_i. The
    factor K, which the paper lacks, keeps the mean weight that of the plain sum, so that learning rates compare.
    After a step the losses of the same batch are looked at again: a task that fell more than the others loses weight;
    Adam on the logits with the gradient J_softmax^T (log L before - log L after). That second look is a forward pass
    without gradient; the paper makes it in every step, here in every one of `every`.

    Args:
        parts, weights: see `Scalarizer`.
        lr, weight_decay: of the logits.
        every: iterations between two looks; 1 as in the paper.

    Raises:
        ConfigError: `every` below 1.
    """

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        lr: float = 0.025,
        weight_decay: float = 0.001,
        every: int = 10,
    ) -> None:
        super().__init__(parts, weights, lr=lr, weight_decay=weight_decay)
        if every < 1:
            raise ConfigError(f"balancing.every={every}: expected a whole number of at least 1")
        self.every = every
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._before: dict[str, float] = {}

    def forward(self, losses: Mapping[str, Tensor], values: Mapping[str, float], valid: Mapping[str, bool]) -> Tensor:
        """See the base class."""
        self._before = {}
        return super().forward(losses, values, valid)

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """sum_i K c z_i log L_i, where c and z are constants."""
        self._before = {task: loss.detach() for task, loss in losses.items()}
        values = _positive(list(losses.values()))
        z = self._z(list(losses)).detach()
        c = 1 / (z / values.detach()).sum()
        return len(losses) * c * (z * values.log()).sum()

    def step(self) -> None:
        """Counts; the logits learn in `seen_again`."""
        self.steps += 1

    @property
    def looks_again(self) -> bool:
        """Every `every` steps, if there is anything to compare."""
        return int(self.steps) % self.every == 0 and len(self._before) > 1

    def seen_again(self, values: Mapping[str, float]) -> None:
        """See the class."""
        losses = {part: torch.tensor(value, dtype=torch.float64) for part, value in values.items()}
        after = self._totals(losses, {task: task in self._before for task in self.tasks})
        tasks = list(self._before)
        delta = _positive([self._before[task] for task in tasks]).log() - _positive([after[t] for t in tasks]).log()
        self._z(tasks).backward(delta)
        self.optimizer.step()

    def _z(self, tasks: Sequence[str]) -> Tensor:
        return torch.stack([self.numbers[task] for task in tasks]).softmax(dim=0)


def _positive(losses: Sequence[Tensor]) -> Tensor:
    return torch.stack(list(losses)).clamp(min=0) + LEAST
