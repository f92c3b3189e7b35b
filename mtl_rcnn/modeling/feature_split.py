"""Features of the trunk, a copy per task, whose gradients meet before they go into the trunk."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.slots import Features

Combine = Callable[..., list[Tensor]]
"""From the gradients of T tasks with respect to each of L levels, [T][L], to one gradient per level, [L]. If the split
has a `trunk`, a second argument is a function that gives the gradients with respect to its parameters."""

_HIDDEN = ("use_reentrant", "appears to not have been used in the graph")
"""Words of PyTorch's errors where gradients cannot be asked for; the first checkpoint of a trunk gives the second."""


class FeatureSplit:
    """Hands every task features of its own; in the backward pass `combine` makes one gradient of the tasks' gradients.

    Every head is back-propagated once and the trunk once, in one pass, so that DDP's hooks fire as always. Tasks
    without a loss come with gradients of zero.

    Args:
        tasks: names.
        combine: see `Combine`; called once per backward pass, without a graph.
        trunk: whose parameters gradients are asked for, None for none. What `combine` then gets gives (T, P), row t the
            gradient of task t on this rank with respect to the P numbers of all parameters that learn, at the price of
            a backward pass through the trunk per task and T copies of its gradient. It goes past DDP's hooks.

    Raises:
        ConfigError: in a backward pass, where reentrant checkpointing hides gradients.
    """

    def __init__(self, tasks: Sequence[str], combine: Combine, trunk: nn.Module | None = None) -> None:
        self.tasks = tuple(tasks)
        self.combine = combine
        self.trunk = trunk
        self._ahead: list[tuple[list[Tensor], list[Tensor]]] | None = None

    def __call__(self, features: Features) -> dict[str, Features]:
        """Task -> its copy of the levels, of the same values."""
        names, levels = list(features), list(features.values())
        if self._ahead is None:
            copies = _Split.apply(self, *levels)
        else:
            copies = [level.detach().requires_grad_() for _ in self.tasks for level in levels]
            self._ahead.append((levels, copies))
        return {task: dict(zip(names, own)) for task, own in zip(self.tasks, _rows(copies, len(levels)), strict=True)}

    def around_trunk(self) -> AbstractContextManager[Any]:
        """Where the trunk is to run: without a graph if no gradient will go into it."""
        return torch.no_grad() if self._ahead is not None and self.trunk is None else nullcontext()

    @contextmanager
    def looking_ahead(self, see: Callable[..., None]) -> Iterator[Callable[[Tensor], None]]:
        """A block in which `see` is shown what `combine` would be, and no parameter gets a gradient.

        Yields:
            what is to be called after each forward pass with the scalar that would be back-propagated.
        """
        self._ahead = []

        def look(scalar: Tensor) -> None:
            ((levels, copies),) = self._ahead
            self._ahead.clear()
            found = _gradients([scalar], copies, materialize_grads=True)
            see(*self._shown(_rows(found, len(levels)), lambda: levels))

        try:
            yield look
        finally:
            self._ahead = None

    def _shown(self, gradients: list[list[Tensor]], levels: Callable[[], Sequence[Tensor]]) -> tuple[Any, ...]:
        """Arguments of `combine`."""
        if self.trunk is None:
            return (gradients,)
        return gradients, lambda: _at_parameters(self.trunk, levels(), gradients)


class _Split(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, split: FeatureSplit, *levels: Tensor) -> tuple[Tensor, ...]:
        ctx.split, ctx.levels = split, len(levels)
        if split.trunk is not None:
            ctx.save_for_backward(*levels)
        return tuple(level.view_as(level) for _ in split.tasks for level in levels)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Any, ...]:
        shown = ctx.split._shown(_rows(gradients, ctx.levels), lambda: ctx.saved_tensors)
        return None, *ctx.split.combine(*shown)


def _rows(tensors: Sequence[Tensor], levels: int) -> list[list[Tensor]]:
    """[T][L] of a list that holds the levels of one task after those of another."""
    return [list(tensors[start : start + levels]) for start in range(0, len(tensors), levels)]


def _at_parameters(trunk: nn.Module, levels: Sequence[Tensor], gradients: list[list[Tensor]]) -> Tensor:
    """(T, P) see `FeatureSplit`; leaves the trunk's graph for another pass."""
    parameters = [parameter for parameter in trunk.parameters() if parameter.requires_grad]
    sizes = [parameter.numel() for parameter in parameters]
    rows = parameters[0].new_empty(len(gradients), sum(sizes))
    learning = [place for place, level in enumerate(levels) if level.requires_grad]
    pull = partial(_gradients, [levels[place] for place in learning], parameters, retain_graph=True)
    for row, own in zip(rows, gradients):
        for place, gradient in zip(row.split(sizes), pull(grad_outputs=[own[place] for place in learning])):
            place.copy_(gradient.flatten())
    return rows


def _gradients(outputs: Sequence[Tensor], inputs: Sequence[Tensor], **options: Any) -> tuple[Tensor, ...]:
    try:
        return torch.autograd.grad(outputs, inputs, **options)
    except RuntimeError as error:
        if not any(words in str(error) for words in _HIDDEN):
            raise
        raise ConfigError(
            "balancing: the method asks for gradients that PyTorch cannot tell: either torch.utils.checkpoint is used "
            "with use_reentrant=True (set it to False), or a parameter of the trunk takes no part in its features "
            "(freeze it); balancing.at=features with solver.accumulate=1 needs neither"
        ) from error
