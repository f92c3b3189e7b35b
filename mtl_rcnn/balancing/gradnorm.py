"""Gradient normalisation."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from mtl_rcnn.balancing.gradient import GradientBalancer
from mtl_rcnn.balancing.scalarizer import OwnAdam
from mtl_rcnn.errors import ConfigError


class GradNorm(GradientBalancer):
    """sum_i w_i L_i with weights w, of sum K, that learn to make tasks train at one rate (Chen et al., GradNorm,
    arXiv 1711.02257, algorithm 1).

    G_i is the norm of the gradient of w_i L_i, r_i = (L_i / L_i(0)) / mean_k L_k / L_k(0). Adam lowers
    sum_i |G_i - mean(G) r_i^alpha| over w, the second term a constant; then w is scaled to the sum K again.

    Departures: G_i is taken at the features, which the last shared layer puts out, or at all parameters of the trunk,
    as LibMTL does, in place of that layer's weights; L_i(0) is the mean over the first `start` steps with the task, in
    which its weight stays as it is, since the first batch alone says little about a detector's losses. Tasks that are
    absent from a batch are left out of its means, and keep their weights.

    Args:
        parts, weights: see `Scalarizer`.
        alpha: how strongly slow tasks are preferred; 0 makes all norms equal.
        lr: of Adam.
        start: steps whose losses make L_i(0).
        at: see `GradientBalancer`.

    Raises:
        ConfigError: `alpha` negative or `start` below 1.
    """

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        alpha: float = 1.5,
        lr: float = 0.025,
        start: int = 20,
        at: str = "features",
    ) -> None:
        super().__init__(parts, weights, at=at)
        if alpha < 0:
            raise ConfigError(f"balancing.alpha={alpha}: expected a number of at least 0")
        if start < 1:
            raise ConfigError(f"balancing.start={start}: expected a whole number of at least 1")
        self.alpha, self.start = float(alpha), int(start)
        number = len(self.tasks)
        self.numbers = nn.ParameterList([torch.ones((), dtype=torch.float64) for _ in range(number)])
        self.optimizer = OwnAdam(self.numbers, lr)
        self.register_buffer("sums", torch.zeros(number, dtype=torch.float64))
        self.register_buffer("counts", torch.zeros(number, dtype=torch.float64))
        self._losses = torch.zeros(number, dtype=torch.float64)
        self._task_weights = dict.fromkeys(self.tasks, 1.0)

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum with the weights as they are."""
        places = [self.tasks.index(task) for task in losses]
        values = torch.stack(list(losses.values()))
        self._losses[places] = values.detach()
        first = torch.tensor([place for place in places if self.counts[place] < self.start], dtype=torch.int64)
        self.sums[first] += self._losses[first]
        self.counts[first] += 1
        return (torch.stack([self.numbers[place].detach() for place in places]) * values).sum()

    def choose(self, gramian: Tensor) -> list[float]:
        """1, since gradients are weighted already; leaves the gradients of the weights."""
        self._learn(gramian)
        return [1.0] * len(self.tasks)

    def scalars(self) -> dict[str, float]:
        """The weights of the tasks in the last step."""
        return {f"weight/{task}": self._task_weights[task] for task in self.tasks}

    def step(self) -> None:
        """A step of Adam; then the weights that it moved have the sum again that they had, so that all sum to K."""
        super().step()
        self._task_weights = {task: float(weight.detach()) for task, weight in zip(self.tasks, self.numbers)}
        moved = [weight for weight in self.numbers if weight.grad is not None]
        before = sum(weight.detach().clone() for weight in moved)
        self.optimizer.step()
        with torch.no_grad():
            after = sum(weight.clamp_(min=1e-3) for weight in moved)  # a weight of 0 would never come back
            for weight in moved:
                weight *= before / after

    def _learn(self, gramian: Tensor) -> None:
        self.check_finite(gramian)
        known = [place for place in self._present if self.counts[place] >= self.start]
        norms = gramian.diagonal().clamp(min=0).sqrt()[known]
        if len(known) < 2 or not norms.isfinite().all() or not norms.any():
            return
        norms = norms / norms.mean()
        progress = self._losses[known] / (self.sums / self.counts)[known].clamp(min=1e-12)
        rates = progress / progress.mean().clamp(min=1e-12)
        for place, norm, rate in zip(known, norms, rates):
            weight = self.numbers[place]
            weight.grad = torch.sign(norm - rate**self.alpha) * norm / weight.detach()
