"""Random loss weighting."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import Scalarizer


class RandomLossWeighting(Scalarizer):
    """sum_i w_i L_i, w = K softmax(z) over the K tasks of the batch, z ~ N(0, I) anew in every step (RLW; Lin et al.,
    arXiv 2111.10603, section 3.1). The factor K, which the paper does not have, keeps the mean weight that of the plain
    sum, so that learning rates compare.

    z is a function of (seed, step): every rank draws the same, and a resumed run goes on as it would have.

    Args:
        parts, weights: see `Scalarizer`.
        seed: of the draws.
    """

    def __init__(self, parts: Sequence[str], weights: Mapping[str, float] | None = None, *, seed: int = 0) -> None:
        super().__init__(parts, weights)
        self.seed = seed
        self.register_buffer("steps", torch.zeros((), dtype=torch.int64))

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        drawn = np.random.default_rng([self.seed, int(self.steps)]).standard_normal(len(self.tasks))
        chosen = torch.from_numpy(drawn)[[self.tasks.index(task) for task in losses]]
        return (len(losses) * chosen.softmax(dim=0) * torch.stack(list(losses.values()))).sum()

    def step(self) -> None:
        """The next step draws anew."""
        self.steps += 1
