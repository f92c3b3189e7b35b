"""The geometric mean of the losses."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mtl_rcnn.balancing.scalarizer import Scalarizer

LEAST = 1e-8
"""Of a loss: at 0 the geometric mean has no derivative. A task below has no weight until its loss grows again."""


class GeometricMean(Scalarizer):
    """(prod_i L_i)^(1/K) over the K tasks of the batch (Chennupati et al., MultiNet++, arXiv 1904.08492, equation 2).

    Task i's weight is GM / (K L_i): halving a loss's unit changes nothing but the learning rate of all."""

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        """See the class."""
        return torch.stack(list(losses.values())).clamp(min=LEAST).log().mean().exp()
