"""How far a mean of a few measurements can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_CHUNK = 1_000_000
"""Draws that are held at a time."""


def bootstrap_interval(
    values: Sequence[float], *, level: float = 0.95, resamples: int = 10_000, seed: int = 0
) -> tuple[float, float]:
    """Percentile interval of the mean (Efron, The Annals of Statistics 7(1), 1979): the middle `level` of the means of
    resamples, each of as many values drawn with replacement.

    Args:
        values: N independent measurements, N at least 1, finite.
        level: in (0, 1).
        resamples: number.
        seed: of the draws.

    Returns:
        Lower and upper end; linear between the means on either side of a percentile.
    """
    given = np.asarray(values, dtype=np.float64)
    rng = np.random.default_rng(seed)
    means = np.empty(resamples)
    rows = max(1, _CHUNK // len(given))
    for start in range(0, resamples, rows):
        part = means[start : start + rows]
        part[:] = given[rng.integers(len(given), size=(len(part), len(given)))].mean(axis=1)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
