"""Impartial multi-task learning, the half that scales losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import LearnedScalarizer


class IMTLL(LearnedScalarizer):
    """sum_i exp(s_i) L_i - s_i with a learned s_i per task: at rest every scaled loss is 1 (IMTL-L; Liu et al., Towards
    Impartial Multi-task Learning, ICLR 2021, section 3.2, with base e)."""

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        terms = [self.numbers[task].exp() * loss - self.numbers[task] for task, loss in losses.items()]
        return torch.stack(terms).sum()
