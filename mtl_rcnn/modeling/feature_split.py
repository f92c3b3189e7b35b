"""Features of the trunk, a copy per task, whose gradients meet before they go into the trunk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from mtl_rcnn.modeling.slots import Features

Combine = Callable[[list[list[Tensor]]], list[Tensor]]
"""From the gradients of T tasks with respect to each of L levels, [T][L], to one gradient per level, [L]."""


class FeatureSplit:
    """Hands every task features of its own; in the backward pass `combine` makes one gradient of the tasks' gradients.

    Every head is back-propagated once and the trunk once, in one pass, so that DDP's hooks fire as always. Tasks
    without a loss come with gradients of zero.

    Args:
        tasks: names.
        combine: see `Combine`; called once per backward pass, without a graph.
    """

    def __init__(self, tasks: Sequence[str], combine: Combine) -> None:
        self.tasks = tuple(tasks)
        self.combine = combine

    def __call__(self, features: Features) -> dict[str, Features]:
        """Task -> its copy of the levels, of the same values."""
        levels = list(features)
        copies = _Split.apply(self.combine, len(self.tasks), *features.values())
        return {
            task: dict(zip(levels, copies[start : start + len(levels)], strict=True))
            for task, start in zip(self.tasks, range(0, len(copies), len(levels)), strict=True)
        }


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, combine: Combine, tasks: int, *levels: Tensor) -> tuple[Tensor, ...]:
        ctx.combine, ctx.levels = combine, len(levels)
        return tuple(level.view_as(level) for _ in range(tasks) for level in levels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        by_task = [list(gradients[start : start + ctx.levels]) for start in range(0, len(gradients), ctx.levels)]
        return None, None, *ctx.combine(by_task)
