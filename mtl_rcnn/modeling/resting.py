"""Tasks that rest: they do not train in a step, and stay as they are."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from mtl_rcnn.modeling.slots import Features, LossParts, Task, full_precision


def resting_losses(task: Task, features: Features) -> LossParts:
    """The losses of a task that rests: zeros of count 0, without anything of it being computed.

    They are sums over nothing of the task's parameters and features, and so give each of them a gradient, of 0 whatever
    it holds: DDP waits for one of every parameter, and those of the trunk that serve this task alone have no other.
    """
    reached = [*task.parameters(), *features.values()]
    zero = torch.stack([full_precision(tensor[None][:0].sum()) for tensor in reached]).sum()
    return {part: (zero, torch.zeros_like(zero.detach())) for part in task.loss_parts}


@contextmanager
def unchanged_buffers(module: nn.Module) -> Iterator[None]:
    """Gives every buffer, such as batch norm's statistics, the value back that it had before the block."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, value in kept:
            buffer.copy_(value)
