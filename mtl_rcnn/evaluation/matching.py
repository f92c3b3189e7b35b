"""Which detection found which object, at a similarity of 0.5 (box or mask IoU, object keypoint similarity).

The matching is COCO's: in order of score, each detection takes the free object that it is most similar to; what is
most similar to an ignore region (a crowd, an object without this label) counts neither as right nor as wrong.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl_rcnn.evaluation.coco_scores import make_scorer
from mtl_rcnn.evaluation.evaluator import Row

SIMILARITY = 0.5
_UNLIMITED = 1_000_000
_LIMITS = {"bbox": 100, "segm": 100, "keypoints": 20}
"""Detections per image and class that COCO's AP counts."""


@dataclass(frozen=True)
class CocoProblem:
    """Ground truth and results of one score type, as the scorers want them.

    Attributes:
        truth: COCO dict; images and annotations are numbered from 1, category ids are class indices.
        rows: with the same image and category ids, of these classes only.
        iou_type: "bbox", "segm" or "keypoints".
        sigmas: (K,) OKS sigmas, for "keypoints".
    """

    truth: Mapping[str, Any]
    rows: Sequence[Row]
    iou_type: str
    sigmas: Sequence[float] | None = None

    def without_classes(self) -> CocoProblem:
        """The same with all objects and detections in one class, 0."""
        one = {"annotations": [{**entry, "category_id": 0} for entry in self.truth["annotations"]]}
        truth = {**self.truth, **one, "categories": [{"id": 0, "name": "any"}]}
        return CocoProblem(truth, [{**row, "category_id": 0} for row in self.rows], self.iou_type, self.sigmas)


@dataclass(frozen=True)
class Matches:
    """D detections and G objects that count.

    Attributes:
        images, classes, scores: (D,) image number, class index and score.
        found: (D,) index into the objects, -1 where a detection found none.
        object_images, object_classes: (G,).
    """

    images: np.ndarray
    classes: np.ndarray
    scores: np.ndarray
    found: np.ndarray
    object_images: np.ndarray
    object_classes: np.ndarray

    def above(self, thresholds: Mapping[int, float]) -> Matches:
        """Without the detections whose score is below their class's threshold (absent: 0). What the others found
        does not change."""
        least = np.array([thresholds.get(int(index), 0.0) for index in self.classes])
        keep = self.scores >= least
        detections = (values[keep] for values in (self.images, self.classes, self.scores, self.found))
        return Matches(*detections, self.object_images, self.object_classes)


def match(problem: CocoProblem, *, by_class: bool = True) -> Matches:
    """Matches detections with objects of their own class, or of any class.

    By class, each image and class has at most as many detections as in COCO's AP (100; 20 for keypoints).
    """
    limit = _LIMITS[problem.iou_type] if by_class else _UNLIMITED
    rows = _best(problem.rows, limit)
    objects = [entry for entry in problem.truth["annotations"] if not _ignored(entry, problem.iou_type)]
    index_of = {entry["id"]: index for index, entry in enumerate(objects)}
    pairs = _pairs(CocoProblem(problem.truth, rows, problem.iou_type, problem.sigmas), limit, by_class)
    counted = [number for number in range(len(rows)) if number not in pairs or pairs[number] in index_of]
    found = [index_of[pairs[number]] if number in pairs else -1 for number in counted]
    return Matches(
        np.array([rows[number]["image_id"] for number in counted], dtype=np.int64),
        np.array([rows[number]["category_id"] for number in counted], dtype=np.int64),
        np.array([rows[number]["score"] for number in counted], dtype=np.float64),
        np.array(found, dtype=np.int64),
        np.array([entry["image_id"] for entry in objects], dtype=np.int64),
        np.array([entry["category_id"] for entry in objects], dtype=np.int64),
    )


def _pairs(problem: CocoProblem, limit: int, by_class: bool) -> dict[int, int]:
    """Position of a row -> id of the annotation it was matched with, ignore regions included."""
    if not problem.rows or not problem.truth["annotations"]:
        return {}
    posed = problem if by_class else problem.without_classes()
    scorer = make_scorer(posed.truth, posed.rows, posed.iou_type, posed.sigmas)
    scorer.params.iouThrs = np.array([SIMILARITY])
    scorer.params.areaRng, scorer.params.areaRngLbl = [[0, 1e10]], ["all"]
    scorer.params.maxDets = [limit]
    scorer.evaluate()
    scorer.accumulate()
    pairs = (key.split("_") for key in scorer.eval["matched"])
    return {int(detection) - 1: int(annotation) for detection, annotation in pairs}


def _best(rows: Sequence[Row], limit: int) -> Sequence[Row]:
    """At most `limit` rows per image and class, those of the highest score; of equal ones the first."""
    if max(Counter((row["image_id"], row["category_id"]) for row in rows).values(), default=0) <= limit:
        return rows
    seen: Counter[tuple[int, int]] = Counter()
    kept = []
    for position in sorted(range(len(rows)), key=lambda position: -rows[position]["score"]):
        key = (rows[position]["image_id"], rows[position]["category_id"])
        seen[key] += 1
        if seen[key] <= limit:
            kept.append(position)
    return [rows[position] for position in sorted(kept)]


def _ignored(entry: Mapping[str, Any], iou_type: str) -> bool:
    return bool(entry.get("iscrowd")) or (iou_type == "keypoints" and not entry.get("num_keypoints"))
