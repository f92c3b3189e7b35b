"""Dynamic weight average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import Scalarizer
from mtl_rcnn.errors import ConfigError


class DynamicWeightAverage(Scalarizer):
    """sum_i w_i L_i, w_i = K exp(r_i / T) / sum_k exp(r_k / T) over the K tasks of the batch, where r_i is the mean of
    task i's loss over the last window of iterations divided by that over the window before (DWA; Liu, Johns and
    Davison, arXiv 1803.10704, equation 7; a window there is an epoch). During the first two windows w_i = 1.

    A task that is absent from a batch adds nothing to its mean; one that is absent from a whole window keeps its ratio.
    Until a task has two means its ratio is 1.

    Args:
        parts, weights: see `Scalarizer`.
        temperature: T; the larger, the more even the weights.
        period: iterations of a window.

    Raises:
        ConfigError: a temperature or period that is not positive.
    """

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        temperature: float = 2.0,
        period: int = 500,
    ) -> None:
        super().__init__(parts, weights)
        for name, value in (("temperature", temperature), ("period", period)):
            if not value > 0:
                raise ConfigError(f"balancing.{name}={value}: expected a number above 0")
        self.temperature, self.period = float(temperature), int(period)
        number = len(self.tasks)
        zeros, unknown = torch.zeros(number, dtype=torch.float64), torch.full((number,), torch.nan, dtype=torch.float64)
        self.register_buffer("sums", zeros.clone())
        self.register_buffer("counts", zeros.clone())
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self.register_buffer("last", unknown.clone())  # mean over the last whole window
        self.register_buffer("before", unknown.clone())

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        places = torch.tensor([self.tasks.index(task) for task in losses])
        values = torch.stack(list(losses.values()))
        self.sums[places] += values.detach()
        self.counts[places] += 1
        ratios = torch.nan_to_num(self.last / self.before, nan=1.0, posinf=1.0)[places]
        return (len(losses) * (ratios / self.temperature).softmax(dim=0) * values).sum()

    def step(self) -> None:
        """Ends the window when it is complete."""
        self.steps += 1
        if int(self.steps) % self.period:
            return
        seen = self.counts > 0
        self.before[seen] = self.last[seen]
        self.last[seen] = self.sums[seen] / self.counts[seen]
        self.sums.zero_()
        self.counts.zero_()
