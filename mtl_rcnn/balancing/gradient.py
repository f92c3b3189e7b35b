"""Methods that make one gradient of the tasks' gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtl_rcnn.balancing.weighted_sum import WeightedSum
from mtl_rcnn.errors import ConfigError, TrainingError

PLACES = ("features", "parameters")
"""Where tasks' gradients are compared."""


class GradientBalancer(WeightedSum):
    """The sum of the losses for the heads; for the trunk, sum_t w_t G_t with weights from the Gramian of the gradients.

    G_t is the gradient of task t's loss, times its fixed weights, over the whole batch, all ranks and micro-batches
    together. At the features it is the gradient with respect to all levels: every image has its own, so that the
    Gramian (T, T) of the batch is the sum of its images'. At the parameters it is the gradient with respect to
    everything in the trunk that learns, and T of them (2 T under accumulation) are in memory before there is a
    Gramian. Either way weights multiply gradients at the features: what arrives at the parameters is linear in these,
    and so is sum_t w_t G_t of the parameters' gradients.

    The Gramian is divided by its mean diagonal first: weights do not depend on the unit of the losses or on a loss
    scale, and tolerances of the methods mean the same everywhere. Weights are such that tasks with orthogonal gradients
    of one length all have 1, as in the plain sum. Every rank finds the same ones.

    Tasks that are absent from the batch are left out. With fewer than two present tasks, or without any gradient, every
    weight is 1.

    Args:
        parts, weights: see `Scalarizer`.
        seed: of methods that draw; draws are a function of (seed, step).
        at: "features", or "parameters" for a backward pass through the trunk per task.

    Attributes:
        reduce: sums a tensor over the ranks, in place of the tensor as it is.
        overflows: whether gradients that are not finite are no fault, since a loss scale will be lowered.

    Raises:
        ConfigError: one task alone, or another `at`.
    """

    adaptive = True
    looks_ahead = True

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        seed: int = 0,
        at: str = "features",
    ) -> None:
        super().__init__(parts, weights)
        if at not in PLACES:
            raise ConfigError(f"balancing.at={at}: expected {' or '.join(PLACES)}")
        if len(self.tasks) < 2:
            raise ConfigError(
                f"balancing: {type(self).__name__} weighs tasks against each other, and the network has only "
                f"{self.tasks[0]}; choose balancing=sum"
            )
        self.seed, self.at = seed, at
        self.reduce: Callable[[Tensor], Tensor] = lambda tensor: tensor
        self.overflows = False
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))
        self._present: list[int] = []
        self._seen: Tensor | None = None
        self._chosen: list[float] | None = None

    def weigh(self, gramian: Tensor) -> Tensor:
        """(K,) weights of K >= 2 tasks.

        Args:
            gramian: (K, K) float64 on the CPU, finite, of mean diagonal 1.
        """
        raise NotImplementedError

    def forward(self, losses: Mapping[str, Tensor], values: Mapping[str, float], valid: Mapping[str, bool]) -> Tensor:
        """See the base class."""
        self._present = [index for index, task in enumerate(self.tasks) if valid[task]]
        self._seen = self._chosen = None
        return super().forward(losses, values, valid)

    def see(self, gradients: list[list[Tensor]], at_parameters: Callable[[], Tensor] | None = None) -> None:
        """Gradients of a micro-batch of this step, before `combine`.

        Args:
            gradients: [T][L], of the tasks with respect to each level of the features.
            at_parameters: gives the gradients with respect to the trunk's parameters, (T, P), where `at` asks for them.
        """
        share = self.gramian(gradients) if at_parameters is None else at_parameters()
        self._seen = share if self._seen is None else self._seen.add_(share)

    def combine(self, gradients: list[list[Tensor]], at_parameters: Callable[[], Tensor] | None = None) -> list[Tensor]:
        """One gradient per level, see `modeling.feature_split`. The step's weights follow from the gradients seen
        before, else from these.

        Raises:
            TrainingError: a task's gradient is not finite.
        """
        if self._chosen is None:
            if self._seen is None:
                self.see(gradients, at_parameters)
            self._chosen = self.choose(self._gramian_of_all())
        return self.weighted_sum(gradients, self._chosen)

    def choose(self, gramian: Tensor) -> list[float]:
        """What the tasks' gradients are multiplied with, from their Gramian over the whole batch, (T, T) float64 on the
        CPU."""
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

    def scalars(self) -> dict[str, float]:
        """The weights of the tasks' gradients in the trunk."""
        return {f"weight/{task}": weight for task, weight in zip(self.tasks, self._chosen or [1.0] * len(self.tasks))}

    def step(self) -> None:
        """The next step draws anew."""
        self.steps += 1

    def check_finite(self, gramian: Tensor) -> bool:
        """Whether all gradients are finite. TrainingError: some are not, and it is not the loss scale's doing."""
        faulty = [task for task, norm in zip(self.tasks, gramian.diagonal().tolist()) if not np.isfinite(norm)]
        if faulty and not self.overflows:
            raise TrainingError(
                f"the gradient of {', '.join(faulty)} with respect to the shared {self.at} is not finite, though the "
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
            total += _inner_products(torch.stack([gradient.flatten() for gradient in level]))
        return total

    def _gramian_of_all(self) -> Tensor:
        total, self._seen = self.reduce(self._seen), None
        if self.at == "parameters":
            # Every rank has the same rows; summed over them, the products are the same bits too, on whatever device.
            total = self.reduce(_inner_products(total))
        return total.cpu()


def _inner_products(rows: Tensor) -> Tensor:
    """(T, T) float64 of (T, N)."""
    rows = rows if rows.dtype == torch.float64 else rows.float()
    return (rows @ rows.t()).double()
