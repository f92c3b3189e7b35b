"""The plain sum, with fixed weights where given."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import Scalarizer
from mtl_rcnn.errors import ConfigError


class WeightedSum(Scalarizer):
    """sum_i w_i L_i over all loss parts i; w_i = 1 unless given.

    Args:
        parts: all loss names, "task/part".
        weights: weight of a whole task ("task") or of one part ("task/part", which multiplies the task's); None
            for none.

    Raises:
        ConfigError: a weight of something that is not a loss, or that is negative.
    """

    def __init__(self, parts: Sequence[str], weights: Mapping[str, float] | None) -> None:
        super().__init__(parts)
        weights = weights or {}
        known = {*self.parts, *(part.split("/")[0] for part in self.parts)}
        for name, weight in weights.items():
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"did you mean '{close[0]}'?" if close else f"losses are {', '.join(self.parts)}"
                raise ConfigError(f"balancing.weights: no loss '{name}'; {hint}")
            if weight < 0:
                raise ConfigError(f"balancing.weights.{name}={weight}: expected a number of at least 0")
        self._weights = {
            part: float(weights.get(part.split("/")[0], 1.0)) * float(weights.get(part, 1.0)) for part in self.parts
        }

    def forward(self, losses: Mapping[str, Tensor], valid: Mapping[str, bool]) -> Tensor:
        """The weighted sum; an absent task adds its zero, which keeps its parameters in the graph."""
        return torch.stack([losses[part] * self._weights[part] for part in self.parts]).sum()

    def weights(self) -> dict[str, float]:
        """The fixed weights."""
        return dict(self._weights)
