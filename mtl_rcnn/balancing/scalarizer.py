"""What turns losses into the scalar that is minimised."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor, nn


class Scalarizer(nn.Module):
    """Combines losses into one scalar. Parameters it owns are trained with the network; buffers are checkpointed.

    Args:
        parts: all loss names, "task/part".
    """

    def __init__(self, parts: Sequence[str]) -> None:
        super().__init__()
        self.parts = tuple(parts)

    def forward(self, losses: Mapping[str, Tensor], valid: Mapping[str, bool]) -> Tensor:
        """The scalar to minimise.

        Args:
            losses: "task/part" -> scalar, divided by its count over all ranks; 0 and connected to the graph for an
                absent task.
            valid: task -> whether any image of the global batch is labelled for it. An absent task is not a task
                with loss 0.
        """
        raise NotImplementedError

    def weights(self) -> dict[str, Any]:
        """Current weight of each part, for the log."""
        raise NotImplementedError
