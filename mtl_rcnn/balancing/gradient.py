"""Methods that make one gradient of the tasks' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtl_rcnn.balancing.weighted_sum import WeightedSum
from mtl_rcnn.errors import ConfigError, TrainingError


class GradientBalancer(WeightedSum):
    """The sum of the losses for the heads; for the trunk, sum_t w_t G_t with weights from the Gramian of the gradients.

    G_t is the gradient of task t's loss, times its fixed weights, with respect to the features of the whole batch, all
    levels and ranks together: the Gramian (T, T) is a sum over levels and ranks, and every rank finds the same weights
    from it. It is divided by its mean diagonal first: weights do not depend on the unit of the losses or on a loss
    scale, and tolerances of the methods mean the same everywhere. Weights are such that tasks with orthogonal gradients
    of one length all have 1, as in the plain sum.

    Tasks that are absent from the batch are left out. With fewer than two present tasks, or without any gradient, every
    weight is 1.

    Args:
        parts, weights: see `Scalarizer`.
        seed: of methods that draw; draws are a function of (seed, step).

    Attributes:
        reduce: sums a tensor over the ranks, in place of the tensor as it is.
        overflows: whether gradients that are not finite are no fault, since a loss scale will be lowered.
    """

    adaptive = True

    def __init__(self, parts: Sequence[str], weights: Mapping[str, float] | None = None, *, seed: int = 0) -> None:
        super().__init__(parts, weights)
        if len(self.tasks) < 2:
            raise ConfigError(
                f"balancing: {type(self).__name__} weighs tasks against each other, and the network has only "
                f"{self.tasks[0]}; choose balancing=sum"
            )
        self.seed = seed
        self.reduce: Callable[[Tensor], Tensor] = lambda gramian: gramian
        self.overflows = False
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._present: list[int] = []
        self._task_weights = dict.fromkeys(self.tasks, 1.0)

    def weigh(self, gramian: Tensor) -> Tensor:
        """(K,) weights of K >= 2 tasks.

        Args:
            gramian: (K, K) float64 on the CPU, finite, of mean diagonal 1.
        """
        raise NotImplementedError

    def forward(self, losses: Mapping[str, Tensor], values: Mapping[str, float], valid: Mapping[str, bool]) -> Tensor:
        """See the base class."""
        self._present = [index for index, task in enumerate(self.tasks) if valid[task]]
        return super().forward(losses, values, valid)

    def combine(self, gradients: list[list[Tensor]]) -> list[Tensor]:
        """One gradient per level, see `modeling.feature_split`.

        Raises:
            TrainingError: a task's gradient is not finite.
        """
        weights = self._weights_of(self.reduce(self.gramian(gradients)).cpu())
        self._task_weights = dict(zip(self.tasks, weights))
        return self.weighted_sum(gradients, weights)

    def scalars(self) -> dict[str, float]:
        """The weights of the tasks' gradients in the trunk."""
        return {f"weight/{task}": weight for task, weight in self._task_weights.items()}

    def step(self) -> None:
        """The next step draws anew."""
        self.steps += 1

    def check_finite(self, gramian: Tensor) -> bool:
        """Whether all gradients are finite. TrainingError: some are not, and it is not the loss scale's doing."""
        faulty = [task for task, norm in zip(self.tasks, gramian.diagonal().tolist()) if not np.isfinite(norm)]
        if faulty and not self.overflows:
            raise TrainingError(
                f"the gradient of {', '.join(faulty)} with respect to the shared features is not finite, though the "
                "loss is; lower solver.lr, set solver.clip_gradients, or leave the task out to see which it is"
            )
        return not faulty

    @staticmethod
    def weighted_sum(gradients: list[list[Tensor]], weights: Sequence[float]) -> list[Tensor]:
        """One gradient per level; besides it nothing of its size is made."""
        totals = [torch.zeros_like(level) for level in gradients[0]]
        for levels, weight in zip(gradients, weights):
            for total, gradient in zip(totals, levels):
                total.add_(gradient, alpha=weight)
        return totals

    @staticmethod
    def gramian(gradients: list[list[Tensor]]) -> Tensor:
        """(T, T) float64 inner products of the tasks' gradients, summed over levels."""
        total = torch.zeros(len(gradients), len(gradients), dtype=torch.float64, device=gradients[0][0].device)
        for level in zip(*gradients):
            rows = torch.stack([gradient.flatten() for gradient in level])
            rows = rows if rows.dtype == torch.float64 else rows.float()
            total += (rows @ rows.t()).double()
        return total

    def _weights_of(self, gramian: Tensor) -> list[float]:
        weights = torch.ones(len(self.tasks), dtype=torch.float64)
        finite = self.check_finite(gramian)
        chosen = gramian[self._present][:, self._present]
        size = chosen.diagonal().mean() if self._present else torch.zeros(())
        if len(self._present) > 1 and finite and size > 0:
            with torch.random.fork_rng(devices=[]):
                state = np.random.SeedSequence([self.seed, int(self.steps)]).generate_state(1, np.uint64)
                torch.default_generator.manual_seed(int(state[0] >> np.uint64(1)))  # of the CPU alone
                weights[self._present] = self.weigh(chosen / size)
        return weights.tolist()
