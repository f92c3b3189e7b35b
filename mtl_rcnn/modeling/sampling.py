"""Which anchors and regions train: a random subset that carries no state from one step to the next."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from mtl_rcnn.errors import ConfigError


class LabelSampler:
    """Draws positives and negatives as Detectron2's `subsample_labels` does, from a stream of its own.

    Args:
        mode: "keyed" draws from a generator seeded by (seed, sample index, stage), so that a resumed or
            differently distributed
            run draws the same; "global" uses torch's global generator in Detectron2's order, for parity with it.
        seed: of the run.
    """

    def __init__(self, mode: str, seed: int) -> None:
        if mode not in ("keyed", "global"):
            raise ConfigError(f"model.sampling={mode}: expected keyed or global")
        self.mode = mode
        self.seed = seed

    def __call__(
        self, labels: Tensor, number: int, positive_fraction: float, background: int, sample_index: int, stage: int
    ) -> tuple[Tensor, Tensor]:
        """Indices of the drawn positives (P,) and negatives (Q,), P + Q <= `number`, P <= `positive_fraction * number`.

        Args:
            labels: (N,) int64; -1 is never drawn, `background` is negative, everything else positive.
            number: how many to draw.
            positive_fraction: in [0, 1].
            background: the negative label.
            sample_index: position of the image in the run's stream of samples.
            stage: distinguishes the draws made for one image.
        """
        positive = torch.nonzero((labels != -1) & (labels != background)).squeeze(1)
        negative = torch.nonzero(labels == background).squeeze(1)
        positives = min(positive.numel(), int(number * positive_fraction))
        negatives = min(negative.numel(), number - positives)
        generator = self._generator(sample_index, stage)
        return (
            positive[_permutation(positive, generator)[:positives]],
            negative[_permutation(negative, generator)[:negatives]],
        )

    def _generator(self, sample_index: int, stage: int) -> torch.Generator | None:
        if self.mode == "global":
            return None
        state = np.random.SeedSequence([self.seed, sample_index, stage]).generate_state(1, np.uint64)
        return torch.Generator().manual_seed(int(state[0] >> np.uint64(1)))


def _permutation(like: Tensor, generator: torch.Generator | None) -> Tensor:
    if generator is None:
        return torch.randperm(like.numel(), device=like.device)
    return torch.randperm(like.numel(), generator=generator).to(like.device)
