"""The score threshold of each class at which precision and recall balance best."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mtl_rcnn.evaluation.matching import Matches


@dataclass(frozen=True)
class OperatingPoint:
    """What a class's detections with at least `threshold` score achieve: f1, precision and recall in 0..1.

    The threshold is the score of a detection; None, with all zeros, if no detection of the class finds anything.
    """

    threshold: float | None
    f1: float
    precision: float
    recall: float


def best_points(matches: Matches) -> dict[int, OperatingPoint]:
    """Class index -> the point of highest F1 = 2 P R / (P + R), of equal ones that of the highest threshold; of the
    classes that have objects."""
    return {int(index): _best_point(matches, matches.classes == index, index) for index in _classes(matches)}


def thresholds_of(points: Mapping[int, OperatingPoint], matches: Matches) -> dict[int, float]:
    """Class index -> score from which on detections are taken seriously: each class's own best one, and, where it has
    none, the best of all detections together (0 if nothing is found at all)."""
    together = _best_point(matches, np.ones(len(matches.scores), dtype=bool), None).threshold or 0.0
    own = {index: point.threshold for index, point in points.items() if point.threshold is not None}
    return {int(index): own.get(int(index), together) for index in {*matches.classes.tolist(), *points}}


def _classes(matches: Matches) -> Sequence[int]:
    return np.unique(matches.object_classes).tolist()


def _best_point(matches: Matches, chosen: np.ndarray, index: int | None) -> OperatingPoint:
    """Of the chosen detections, against the objects of one class (None: of all)."""
    objects = len(matches.object_classes) if index is None else int((matches.object_classes == index).sum())
    order = np.argsort(-matches.scores[chosen], kind="stable")
    scores, hits = matches.scores[chosen][order], (matches.found[chosen] >= 0)[order]
    true = np.cumsum(hits)
    # A threshold admits all detections of equal score: only the last of them is a point of the curve.
    ends = np.append(scores[1:] != scores[:-1], True)[: len(scores)]
    true, taken, scores = true[ends], np.flatnonzero(ends) + 1, scores[ends]
    if not true.size or true[-1] == 0:
        return OperatingPoint(None, 0.0, 0.0, 0.0)
    best = int(np.argmax(2 * true / (taken + objects)))
    return OperatingPoint(
        float(scores[best]),
        float(2 * true[best] / (taken[best] + objects)),
        float(true[best] / taken[best]),
        float(true[best] / objects),
    )
