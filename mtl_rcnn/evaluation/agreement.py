"""Which pairs of tasks agree or conflict: a verdict on each pair from the cosines of its gradients in many batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

from mtl_rcnn.evaluation.bootstrap import bootstrap_interval

LEAST = 5
"""Batches with both tasks below which nothing is said of a pair."""
CONFLICT, AGREE, NEITHER, TOO_FEW = "conflict", "agree", "neither", "too few batches"
_ORDER = (CONFLICT, AGREE, NEITHER, TOO_FEW)


@dataclass(frozen=True)
class Pair:
    """Two tasks.

    Attributes:
        first, second: names, in slot order.
        batches: in which both have a gradient.
        negative, positive: of these, batches with a cosine below and above 0.
        mean: cosine; nan without a batch.
        low, high: 95 % bootstrap interval of the mean; nan with fewer than `LEAST` batches.
    """

    first: str
    second: str
    batches: int
    negative: int
    positive: int
    mean: float
    low: float
    high: float

    @property
    def verdict(self) -> str:
        """`CONFLICT` or `AGREE` where the interval leaves out 0, else `NEITHER`; `TOO_FEW` batches to say."""
        if self.batches < LEAST:
            return TOO_FEW
        return CONFLICT if self.high < 0 else AGREE if self.low > 0 else NEITHER


def judge(tasks: Sequence[str], cosines: Sequence[Mapping[tuple[str, str], float]], seed: int = 0) -> list[Pair]:
    """Every pair of tasks.

    Args:
        tasks: names, in slot order.
        cosines: of each batch, (task, later task) -> cosine, of pairs that have one.
        seed: of the bootstrap.
    """
    return [_judged(pair, [own[pair] for own in cosines if pair in own], seed) for pair in combinations(tasks, 2)]


def sentences(pairs: Sequence[Pair], batches: int) -> list[str]:
    """What to say of each pair: conflicts first, then agreements, the strongest of each at the top.

    Args:
        batches: that were looked at.
    """
    ordered = sorted(pairs, key=lambda pair: (_ORDER.index(pair.verdict), -abs(pair.mean)))
    return [_sentence(pair, batches) for pair in ordered]


def cosine_rows(pairs: Sequence[Pair]) -> list[list[str]]:
    """A table with its header; empty cells where there is no number."""
    header = ["first", "second", "verdict", "mean_cosine", "low", "high", "batches", "negative", "positive"]
    rows = [
        [
            p.first,
            p.second,
            p.verdict,
            *map(cell, (p.mean, p.low, p.high)),
            *map(str, (p.batches, p.negative, p.positive)),
        ]
        for p in pairs
    ]
    return [header, *rows]


def cell(value: float) -> str:
    """A number of a table: six figures, nothing for nan."""
    return "" if math.isnan(value) else f"{value:.6g}"


def _judged(pair: tuple[str, str], values: Sequence[float], seed: int) -> Pair:
    mean = sum(values) / len(values) if values else math.nan
    low, high = bootstrap_interval(values, seed=seed) if len(values) >= LEAST else (math.nan, math.nan)
    negative, positive = sum(value < 0 for value in values), sum(value > 0 for value in values)
    return Pair(*pair, len(values), negative, positive, mean, low, high)


def _sentence(pair: Pair, batches: int) -> str:
    names = f"{pair.first} and {pair.second}"
    if pair.verdict == TOO_FEW:
        return (
            f"{names}: too few batches to say, both have gradients in {pair.batches} of {batches}, needed are {LEAST}"
        )
    verb = {CONFLICT: "conflict", AGREE: "agree", NEITHER: "neither agree nor conflict"}[pair.verdict]
    sign, number = ("positive", pair.positive) if pair.verdict == AGREE else ("negative", pair.negative)
    interval = f"{pair.mean:.2g} [{pair.low:.2g}, {pair.high:.2g}]"
    return f"{names} {verb}: mean cosine {interval}, {sign} in {number} of {pair.batches} batches"
