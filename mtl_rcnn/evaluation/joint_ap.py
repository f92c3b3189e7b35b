"""Average precision of detections that must be right in two ways at once: where an object is, and what it is like.

This is Fashionpedia's AP_IoU+F1 (arXiv 2004.12276; followed is `fashionpedia/fp_eval.py` of
github.com/KMnP/fashionpedia-api, read at commit 6e2d72b): a detection is right at the thresholds (t, f) if it has an
IoU of at least t and an F1 of at least f with the same free object of its class; of several such objects it takes, in
their order, one that is at least as good in both ways as the one before. Departures: a crowd may be found many times,
as in COCO; and without the second condition exactly COCO's matching and average precision are left, where `fp_eval.py`
still prefers among objects those of a higher F1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from faster_coco_eval import mask as mask_api

from mtl_rcnn.evaluation.multilabel import UNKNOWN

THRESHOLDS = np.linspace(0.5, 0.95, 10)
"""COCO's of IoU, and Fashionpedia's of F1: 0.5, 0.55 ... 0.95."""

DETECTIONS = 100
"""Per image and class, those of the highest score."""

_RECALLS = np.linspace(0.0, 1.0, 101)
_ALMOST_ONE = 1 - 1e-10


@dataclass(frozen=True)
class Located:
    """N boxes.

    Attributes:
        images, classes: (N,) image number and class index.
        boxes: (N, 4) [x, y, width, height] in pixels.
    """

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray

    def at(self, index: np.ndarray) -> Located:
        """These of them."""
        return Located(self.images[index], self.classes[index], self.boxes[index])


@dataclass(frozen=True)
class Encounter:
    """D detections and G objects of one class in one image.

    Attributes:
        detections, objects: (D,) and (G,) their indices among all.
        scores: (D,).
        overlap: (D, G) IoU; with a crowd the part of the detection that lies in it.
        ignored: (G,) bool: what finds such an object is neither right nor wrong.
        crowd: (G,) bool: may be found by many; ignored, too.
    """

    detections: np.ndarray
    objects: np.ndarray
    scores: np.ndarray
    overlap: np.ndarray
    ignored: np.ndarray
    crowd: np.ndarray


def encounters(
    detections: Located, scores: np.ndarray, objects: Located, ignored: np.ndarray, crowd: np.ndarray
) -> dict[int, list[Encounter]]:
    """Class index -> who meets whom in each image that has either, in the order of the images' numbers.

    Args:
        scores: of the detections.
        ignored, crowd: of the objects, see `Encounter`.
    """
    members: dict[tuple[int, int], tuple[list[int], list[int]]] = {}
    for side, located in enumerate((detections, objects)):
        for index, key in enumerate(zip(located.classes.tolist(), located.images.tolist())):
            members.setdefault(key, ([], []))[side].append(index)
    met: dict[int, list[Encounter]] = {}
    for class_index, image in sorted(members):
        found, there = (np.array(part, dtype=np.int64) for part in members[class_index, image])
        overlap = np.zeros((len(found), len(there)))
        if overlap.size:
            sides = detections.boxes[found], objects.boxes[there], crowd[there].astype(np.uint8)
            overlap = np.asarray(mask_api.iou(*sides)).reshape(overlap.shape)
        encounter = Encounter(found, there, scores[found], overlap, ignored[there] | crowd[there], crowd[there])
        met.setdefault(class_index, []).append(encounter)
    return met


def find_objects(
    encounter: Encounter, agreement: np.ndarray | None, overlaps: np.ndarray, agreements: np.ndarray
) -> np.ndarray:
    """(T, F, D) which of its objects each detection finds at T least overlaps and F least agreements, -1 for none. In
    order of score; objects that are ignored come last.

    Args:
        agreement: (D, G) in 0..1; None where the place alone counts.
    """
    agreement = np.ones_like(encounter.overlap) if agreement is None else agreement
    found = np.full((len(overlaps), len(agreements), len(encounter.scores)), -1)
    taken = np.zeros((*found.shape[:2], len(encounter.ignored)), dtype=bool)
    least_overlap = np.minimum(overlaps, _ALMOST_ONE)[:, None].repeat(len(agreements), axis=1)
    least_agreement = np.minimum(agreements, _ALMOST_ONE)[None].repeat(len(overlaps), axis=0)
    objects = np.argsort(encounter.ignored, kind="stable")
    for detection in _best(encounter.scores):
        near = objects[encounter.overlap[detection, objects] >= least_overlap.min()]
        if len(near) == 0:
            continue
        best, counts = found[:, :, detection], np.zeros(found.shape[:2], dtype=bool)
        overlap, agreed = least_overlap.copy(), least_agreement.copy()
        for index in near:
            here, alike = encounter.overlap[detection, index], agreement[detection, index]
            better = (here >= overlap) & (alike >= agreed)
            if not encounter.crowd[index]:
                better &= ~taken[:, :, index]
            if encounter.ignored[index]:
                better &= ~counts
            else:
                counts |= better
            best[better], overlap[better], agreed[better] = index, here, alike
        rows, columns = np.nonzero(best >= 0)
        taken[rows, columns, best[rows, columns]] = True
    return found


def joint_average_precision(
    met: Sequence[Encounter],
    agreement: Sequence[np.ndarray] | None = None,
    overlaps: np.ndarray = THRESHOLDS,
    agreements: np.ndarray = THRESHOLDS,
) -> np.ndarray | None:
    """(T, F) average precision in 0..1 of one class, interpolated at COCO's 101 recalls; None if no object counts.

    Args:
        met: the class in every image, in the order in which equal scores are to be ranked.
        agreement: (D, G) in 0..1 of each encounter; None where the place alone counts (F is then best 1).
        overlaps: T least overlaps.
        agreements: F least agreements.
    """
    objects = sum(int((~encounter.ignored).sum()) for encounter in met)
    if objects == 0:
        return None
    scores, right, wrong = [], [], []
    for index, encounter in enumerate(met):
        best = _best(encounter.scores)
        alike = None if agreement is None else agreement[index]
        found = find_objects(encounter, alike, overlaps, agreements)[:, :, best]
        ignored = np.r_[encounter.ignored, False][found]  # -1 is the last
        scores.append(encounter.scores[best])
        right.append((found >= 0) & ~ignored)
        wrong.append(found < 0)
    order = np.argsort(-np.concatenate(scores), kind="stable")
    right, wrong = (np.concatenate(parts, axis=2)[:, :, order] for parts in (right, wrong))
    cells = [_average_precision(r, w, objects) for r, w in zip(_flat(right), _flat(wrong))]
    return np.array(cells).reshape(len(overlaps), len(agreements))


def label_f1(chosen: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """How well D detections' labels agree with G objects', twice, (D, G) each in 0..1.

    The first is Fashionpedia's (`f1Type = "binary_macro"`): the mean of the F1 of what holds and the F1 of what does
    not hold, of those of the two that occur. With many labels, of which few hold, the latter is nearly one for whatever
    is said, and the mean nearly 0.5 for saying nothing. The second is the F1 of what holds alone, and one if nothing
    holds and nothing is said. Entries that nobody labelled count nowhere; an object without any is agreed with.

    Args:
        chosen: (D, V) bool.
        truth: (G, V) 1, 0 or `UNKNOWN`.
    """
    said, known, holds = chosen.astype(np.int64), (truth != UNKNOWN).astype(np.int64), (truth == 1).astype(np.int64)
    hits = said @ holds.T
    false, missed = said @ known.T - hits, holds.sum(axis=1) - hits
    rejected = known.sum(axis=1) - hits - false - missed
    positive, negative = (_f1(count, false + missed) for count in (hits, rejected))
    occurring = (~np.isnan(positive)).astype(int) + ~np.isnan(negative)
    total = np.nan_to_num(positive) + np.nan_to_num(negative)
    both = np.divide(total, occurring, out=np.ones_like(total), where=occurring > 0)
    return both, np.nan_to_num(positive, nan=1.0)


def _f1(hits: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """2 hits / (2 hits + errors), nan where there are neither."""
    total = 2 * hits + errors
    return np.divide(2 * hits, total, out=np.full(total.shape, np.nan), where=total > 0)


def _average_precision(right: np.ndarray, wrong: np.ndarray, objects: int) -> float:
    """Of (N,) bools in order of score."""
    hits, misses = np.cumsum(right), np.cumsum(wrong)
    precision = hits / (hits + misses + np.spacing(1))
    envelope = np.r_[np.maximum.accumulate(precision[::-1])[::-1], 0.0]  # the last is for recalls never reached
    return float(envelope[np.searchsorted(hits / objects, _RECALLS, side="left")].mean())


def _best(scores: np.ndarray) -> np.ndarray:
    return np.argsort(-scores, kind="stable")[:DETECTIONS]


def _flat(values: np.ndarray) -> np.ndarray:
    return values.reshape(values.shape[0] * values.shape[1], values.shape[2])
