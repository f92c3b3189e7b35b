"""The plain sum, with fixed weights where given."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import Scalarizer


class WeightedSum(Scalarizer):
    """sum_i w_i L_i over all loss parts i; w_i = 1 unless given."""

    adaptive = False

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """The sum."""
        return torch.stack(list(losses.values())).sum()
