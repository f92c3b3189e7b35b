"""The numbers of a comparison: means and deviations over seeds, delta_m, and what is noise."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from mtl_rcnn.comparison.plan import Network


@dataclass(frozen=True)
class Spread:
    """A number measured once per seed.

    Attributes:
        values: one per seed, at least one.
    """

    values: tuple[float, ...]

    @property
    def mean(self) -> float:
        """Over the seeds."""
        return statistics.fmean(self.values)

    @property
    def deviation(self) -> float | None:
        """Standard deviation of a single training, over the seeds (n - 1 in the denominator); None of one seed."""
        return statistics.stdev(self.values) if len(self.values) > 1 else None


@dataclass(frozen=True)
class Row:
    """A network's line.

    Attributes:
        network: what was trained.
        seeds: with which.
        scores: task -> its metric.
        terms: task -> how much better it is than the task's own network, in percent of that.
        delta_m: mean of the terms over the tasks.
        step_seconds: of a training step.
        parameters: number.
        inference_ms: per image, None if not measured.
    """

    network: Network
    seeds: tuple[int, ...]
    scores: Mapping[str, Spread]
    step_seconds: Spread
    terms: Mapping[str, Spread] = field(default_factory=dict)
    delta_m: Spread | None = None
    parameters: int | None = None
    inference_ms: float | None = None


def relative(value: float, baseline: float, higher_is_better: bool) -> float:
    """How much better `value` is, in percent of the baseline: a term of delta_m.

    (-1)^l (M - B) / B with l = 1 where lower is better: Maninis et al., 2019 (arXiv 1904.08918); Vandenhende et al.,
    Multi-Task Learning for Dense Prediction Tasks, 2021 (arXiv 2004.13379), equation 10. Positive is better.

    Raises:
        ZeroDivisionError: the baseline is 0, of which nothing is a percentage.
    """
    sign = 1.0 if higher_is_better else -1.0
    return 100.0 * sign * (value - baseline) / abs(baseline)


def delta_m(
    scores: Mapping[str, Spread], own: Mapping[str, Spread], higher_is_better: Mapping[str, bool]
) -> tuple[dict[str, Spread], Spread | None]:
    """The terms of the tasks, and their mean, delta_m.

    The baselines are the means over the seeds of the tasks' own networks; the deviation is that of the network's own
    seeds. None, and no term, where a task has no baseline or one of 0.

    Args:
        scores: task -> the network's metric, by seed.
        own: task -> the metric of the task's own network.
    """
    terms: dict[str, Spread] = {}
    for task, score in scores.items():
        if task in own and own[task].mean != 0:
            base = own[task].mean
            terms[task] = Spread(tuple(relative(value, base, higher_is_better[task]) for value in score.values))
    if not terms or len(terms) < len(scores):
        return terms, None
    return terms, Spread(tuple(statistics.fmean(by_seed) for by_seed in zip(*(term.values for term in terms.values()))))


def with_deltas(rows: Sequence[Row], higher_is_better: Mapping[str, bool]) -> list[Row]:
    """The rows with terms and delta_m against the tasks' own networks among them."""
    own = own_scores(rows)
    found = []
    for row in rows:
        terms, delta = delta_m(row.scores, own, higher_is_better)
        found.append(replace(row, terms=terms, delta_m=delta))
    return found


def own_scores(rows: Sequence[Row]) -> dict[str, Spread]:
    """Task -> what its own network reaches."""
    return {row.network.own_of: row.scores[row.network.own_of] for row in rows if row.network.own_of is not None}


def apart(rows: Sequence[Row]) -> Spread | None:
    """delta_m of one network per task: 0 in the mean, with its deviation; None where a task's own is missing, or they
    have different seeds."""
    own = [row.terms.get(row.network.own_of) for row in rows if row.network.own_of is not None]
    if not own or None in own or len({len(term.values) for term in own}) > 1:
        return None
    return Spread(tuple(statistics.fmean(by_seed) for by_seed in zip(*(term.values for term in own))))


def noise(first: Spread, second: Spread) -> float | None:
    """The larger of the two standard deviations: a difference of means that is not larger is noise. None where a
    network was trained with one seed alone."""
    if first.deviation is None or second.deviation is None:
        return None
    return max(first.deviation, second.deviation)


def is_noise(first: Spread, second: Spread) -> bool | None:
    """Whether the difference of two means is within one standard deviation; None where that is unknown."""
    allowed = noise(first, second)
    return None if allowed is None else abs(first.mean - second.mean) <= allowed
