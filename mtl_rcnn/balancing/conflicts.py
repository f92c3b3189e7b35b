"""Gradient methods of torchjd, on the Gramian."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torchjd.aggregation import (
    AlignedMTLWeighting,
    CAGradWeighting,
    IMTLGWeighting,
    MGDAWeighting,
    PCGradWeighting,
    UPGradWeighting,
)

from mtl_rcnn.balancing.gradient import GradientBalancer
from mtl_rcnn.errors import ConfigError

_NEWTON_STEPS = 50


class PCGrad(GradientBalancer):
    """Of two conflicting gradients each loses its projection on the other, in random order (Yu et al.,
    arXiv 2001.06782, algorithm 1)."""

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        return PCGradWeighting()(gramian)


class MGDA(GradientBalancer):
    """The shortest vector of the convex hull of the gradients, times K (Sener and Koltun, arXiv 1810.04650; at the
    features, their MGDA-UB, section 3.3)."""

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        return len(gramian) * MGDAWeighting()(gramian)


class IMTLG(GradientBalancer):
    """A combination whose projections on all normalised gradients are equal (Liu et al., Towards Impartial Multi-task
    Learning, ICLR 2021, section 3.1), times K. Weights may be negative."""

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        return len(gramian) * IMTLGWeighting()(gramian)


class AlignedMTL(GradientBalancer):
    """The principal components of the gradients, all made as long as the shortest (Senushkin et al., arXiv 2305.19000,
    algorithm 1), times K."""

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        return len(gramian) * AlignedMTLWeighting()(gramian)


class UPGrad(GradientBalancer):
    """The mean of the gradients' projections on the cone in which no loss grows (Quinton and Rey, arXiv 2406.16232,
    section 3), times K."""

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        return len(gramian) * UPGradWeighting()(gramian)


class CAGrad(GradientBalancer):
    """The direction near the mean gradient that serves the worst-off task best (Liu et al., arXiv 2110.14048,
    equation 5), times K. Needs the extra "cagrad".

    Args:
        parts, weights, seed, at: see `GradientBalancer`.
        c: radius of the ball around the mean, in lengths of it; 0 is the plain sum.
    """

    def __init__(
        self,
        parts: Sequence[str],
        weights: Mapping[str, float] | None = None,
        *,
        c: float = 0.4,
        seed: int = 0,
        at: str = "features",
    ) -> None:
        super().__init__(parts, weights, seed=seed, at=at)
        if c < 0:
            raise ConfigError(f"balancing.c={c}: expected a number of at least 0")
        self.weighting = _cagrad(c)

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        return len(gramian) * self.weighting(gramian)


class NashMTL(GradientBalancer):
    """The Nash bargaining solution: weights a > 0 with G a = 1 / a (Navon et al., arXiv 2202.01017, claim 3.2).

    It is the minimum of the strictly convex a^T G a / 2 - sum_i log a_i, and is found by Newton's method. The authors'
    sequence of convex programs, as torchjd 0.18 has it, stops at its start where gradients agree; their bound on the
    norm of the result is left to `solver.clip_gradients`.
    """

    def weigh(self, gramian: Tensor) -> Tensor:
        """See the base class."""
        gramian = gramian + 1e-9 * torch.eye(len(gramian)).to(gramian)  # parallel gradients leave no unique minimum
        weights = gramian.diagonal().clamp(min=1e-9).rsqrt()
        for _ in range(_NEWTON_STEPS):
            slope = gramian @ weights - 1 / weights
            if slope.abs().max() * weights.max() < 1e-12:
                break
            step = torch.linalg.solve(gramian + (weights**-2).diag(), slope)
            # Damped: the function is self-concordant, so that this length keeps weights positive and lowers it.
            decrement = (slope @ step).clamp(min=0).sqrt()
            weights = weights - step / (1 + decrement if decrement > 0.25 else 1)
        return weights


def _cagrad(c: float) -> CAGradWeighting:
    try:
        return CAGradWeighting(c=c)
    except ImportError as error:
        raise ConfigError(
            f"balancing: CAGrad needs cvxpy and clarabel: pip install 'mtl-rcnn[cagrad]' ({error})"
        ) from error
