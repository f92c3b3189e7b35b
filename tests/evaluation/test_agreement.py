"""Bootstrap intervals against NumPy and known cases; verdicts and sentences on pairs of tasks."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mtl_rcnn.evaluation.agreement import cosine_rows, judge, sentences
from mtl_rcnn.evaluation.bootstrap import bootstrap_interval

RNG = np.random.default_rng(3)


@pytest.mark.parametrize("values", [RNG.normal(0.2, 1, 50), RNG.exponential(2, 7), [-1.0, 0.5, 4.0]])
def test_an_interval_is_that_of_a_plain_loop(values: np.ndarray) -> None:
    rng = np.random.default_rng(1)
    means = sorted(np.mean([values[rng.integers(len(values))] for _ in values]) for _ in range(10_000))
    low, high = bootstrap_interval(values, seed=0)
    assert low == pytest.approx(np.percentile(means, 2.5), abs=0.06 * np.std(values))
    assert high == pytest.approx(np.percentile(means, 97.5), abs=0.06 * np.std(values))


def test_an_interval_of_many_values_is_that_of_the_normal_distribution() -> None:
    values = RNG.normal(5, 2, 4000)  # more than are drawn at a time
    low, high = bootstrap_interval(values)
    half = 1.96 * values.std() / math.sqrt(len(values))
    assert (low, high) == pytest.approx((values.mean() - half, values.mean() + half), abs=0.05 * half)


def test_equal_values_have_an_interval_without_width() -> None:
    low, high = bootstrap_interval([0.1] * 9)
    assert low == high == pytest.approx(0.1)
    assert bootstrap_interval([-3.0]) == (-3.0, -3.0)


def test_symmetric_values_have_an_interval_around_0() -> None:
    low, high = bootstrap_interval([-2.0, -1.0, 1.0, 2.0])
    assert low < 0 < high
    assert low == pytest.approx(-high, abs=0.05)


def test_an_interval_is_a_function_of_the_seed_and_widens_with_the_level() -> None:
    values = RNG.normal(size=20)
    assert bootstrap_interval(values, seed=4) == bootstrap_interval(values, seed=4)
    assert bootstrap_interval(values, seed=4) != bootstrap_interval(values, seed=5)
    narrow, wide = (bootstrap_interval(values, level=level) for level in (0.5, 0.99))
    assert wide[0] < narrow[0] < narrow[1] < wide[1]


def test_verdicts() -> None:
    steady = [{("a", "b"): -0.12, ("a", "c"): 0.3, ("b", "c"): 0.1 * (-1) ** n} for n in range(20)]
    pairs = judge("abc", steady)
    assert [pair.verdict for pair in pairs] == ["conflict", "agree", "neither"]
    assert sentences(pairs, 20) == [
        "a and b conflict: mean cosine -0.12 [-0.12, -0.12], negative in 20 of 20 batches",
        "a and c agree: mean cosine 0.3 [0.3, 0.3], positive in 20 of 20 batches",
        f"b and c neither agree nor conflict: mean cosine {pairs[2].mean:.2g} "
        f"[{pairs[2].low:.2g}, {pairs[2].high:.2g}], negative in 10 of 20 batches",
    ]
    assert pairs[2].low < 0 < pairs[2].high


def test_batches_that_lack_a_task_do_not_count() -> None:
    seen = [{("a", "b"): -0.5} if n < 4 else {("a", "c"): 0.5} if n < 9 else {} for n in range(12)]
    ab, ac, bc = judge("abc", seen)
    assert (ab.batches, ac.batches, bc.batches) == (4, 5, 0)
    assert (ab.verdict, ac.verdict, bc.verdict) == ("too few batches", "agree", "too few batches")
    said = sentences([ab, ac, bc], 12)
    assert said[0] == "a and c agree: mean cosine 0.5 [0.5, 0.5], positive in 5 of 5 batches"
    assert "a and b: too few batches to say, both have gradients in 4 of 12, needed are 5" in said
    assert cosine_rows([ab, ac, bc])[1:] == [
        ["a", "b", "too few batches", "-0.5", "", "", "4", "4", "0"],
        ["a", "c", "agree", "0.5", "0.5", "0.5", "5", "0", "5"],
        ["b", "c", "too few batches", "", "", "", "0", "0", "0"],
    ]


def test_the_strongest_come_first() -> None:
    seen = [{("a", "b"): -0.1, ("a", "c"): 0.2, ("a", "d"): -0.3, ("b", "c"): 0.4}] * 6
    said = sentences(judge("abcd", seen), 6)
    assert [line.split(":")[0] for line in said[:4]] == [
        *("a and d conflict", "a and b conflict"),
        *("b and c agree", "a and c agree"),
    ]
