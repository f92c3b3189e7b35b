"""Weights from learned homoscedastic uncertainty."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import LearnedScalarizer
from mtl_rcnn.errors import ConfigError


class UncertaintyWeighting(LearnedScalarizer):
    """sum_i c_i exp(-s_i) L_i + s_i / 2 with a learned log-variance s_i per task; c_i is 1 for classification and 1/2
    for regression (Kendall, Gal and Cipolla, arXiv 1705.07115, equations 7 and 10, s as in their section 3.3).

    The paper derives two forms; a task here is a whole head, whose losses mix both, and counts as classification unless
    it is named. At rest in s every task's weight is 1 / (2 L_i), whichever its form: fixed weights of whole tasks only
    move s.

    Args:
        parts, weights, start, lr: see `LearnedScalarizer`.
        regression: tasks whose loss is a distance, such as [depth].

    Raises:
        ConfigError: `regression` names no selected task.
    """

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        regression: Sequence[str] = (),
        start: float = 0.0,
        lr: float = 0.025,
    ) -> None:
        super().__init__(parts, weights, start=start, lr=lr)
        for name in regression:
            if name not in self.tasks:
                close = difflib.get_close_matches(name, self.tasks, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"tasks are {', '.join(self.tasks)}"
                raise ConfigError(f"balancing.regression: no task '{name}'; {hint}")
        self.shares = {task: 0.5 if task in regression else 1.0 for task in self.tasks}

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        terms = [
            self.shares[task] * (-self.numbers[task]).exp() * loss + self.numbers[task] / 2
            for task, loss in losses.items()
        ]
        return torch.stack(terms).sum()
