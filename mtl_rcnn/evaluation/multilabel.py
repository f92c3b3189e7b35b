"""Scores of tasks that say yes or no to each of several labels. Entries that nobody labelled count nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_rcnn.evaluation.evaluator import Metric

UNKNOWN = -1
"""Truth of an entry that the data set does not label."""


@dataclass(frozen=True)
class Decisions:
    """What was said of N images (or boxes) and C labels, and what is true.

    Attributes:
        scores: (N, C) float, higher is more likely.
        chosen: (N, C) bool, the labels that are said to hold.
        truth: (N, C) int, 1, 0, or `UNKNOWN`.
    """

    scores: np.ndarray
    chosen: np.ndarray
    truth: np.ndarray


def multilabel_metrics(decisions: Decisions, names: Sequence[str]) -> dict[str, Metric]:
    """In percent, higher is better:

    binary_accuracy: entries said right, of all known ones (Keras' metric of the name, over the whole set);
    exact_match: rows of which every known entry is right, of the rows that have one;
    macro_F1: mean of F1 over the labels that hold somewhere; micro_F1: F1 of all entries together;
    mAP, mA: means of AP and of (true positive rate + true negative rate) / 2 over the labels that hold somewhere and
        fail somewhere: without a failure every AP is 100;
    AP/<label>, F1/<label>, accuracy/<label>: of one label, where it counts in the means.

    Args:
        decisions: at least one known entry.
        names: of the C labels.
    """
    known = decisions.truth != UNKNOWN
    positive = decisions.truth == 1
    right = decisions.chosen == positive
    rows = known.any(axis=1)
    shown = [index for index in range(len(names)) if positive[:, index].any()]
    balanced = [index for index in shown if (known & ~positive)[:, index].any()]
    ap, f1, accuracy = {}, {}, {}
    for index in shown:
        of = known[:, index]
        if index in balanced:
            ap[index] = average_precision(decisions.scores[of, index], positive[of, index])
        f1[index] = f1_score(decisions.chosen[of, index], positive[of, index])
        accuracy[index] = float(right[of, index].mean())
    rates = [_balanced(decisions.chosen[known[:, i], i], positive[known[:, i], i]) for i in balanced]
    none = None if shown else "no label holds anywhere"
    constant = None if balanced else "no label holds somewhere and fails somewhere"
    metrics = {
        "binary_accuracy": _percent(right[known].mean()),
        "exact_match": _percent((right | ~known)[rows].all(axis=1).mean()),
        "mAP": _percent(_mean(ap.values()), constant),
        "micro_F1": _percent(f1_score(decisions.chosen[known], positive[known])),
        "macro_F1": _percent(_mean(f1.values()), none),
        "mA": _percent(_mean(rates), constant),
    }
    for kind, values in (("AP", ap), ("F1", f1), ("accuracy", accuracy)):
        metrics |= {f"{kind}/{names[index]}": _percent(value) for index, value in values.items()}
    return metrics


def average_precision(scores: np.ndarray, positive: np.ndarray) -> float:
    """Area under precision over recall as the sum of (R_n - R_(n-1)) P_n over the distinct scores n, without
    interpolation (as scikit-learn's `average_precision_score`).

    Args:
        scores: (N,).
        positive: (N,) bool, at least one True.
    """
    order = np.argsort(-scores, kind="stable")
    ordered, hits = scores[order], np.cumsum(positive[order])
    last = np.r_[np.flatnonzero(np.diff(ordered)), len(ordered) - 1]  # equal scores are one step
    steps = np.diff(np.r_[0, hits[last]]) / hits[-1]
    return float((steps * hits[last] / (last + 1)).sum())


def f1_score(chosen: np.ndarray, positive: np.ndarray) -> float:
    """2 TP / (2 TP + FP + FN) of (N,) bools; 0 where there is nothing to find and nothing was found."""
    total = int(chosen.sum() + positive.sum())
    return 2 * int((chosen & positive).sum()) / total if total else 0.0


def _balanced(chosen: np.ndarray, positive: np.ndarray) -> float:
    return float(chosen[positive].mean() + (~chosen[~positive]).mean()) / 2


def _mean(values: Sequence[float]) -> float:
    values = list(values)
    return sum(values) / len(values) if values else 0.0


def _percent(share: float, reason: str | None = None) -> Metric:
    return Metric(100 * float(share), reason=reason)
