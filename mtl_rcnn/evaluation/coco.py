"""COCO scores of boxes, masks and keypoints, with faster-coco-eval; numbers equal pycocotools' on the same JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record
from mtl_rcnn.evaluation.coco_rows import FIELDS, RowReader, encode_masks, xyxy_to_xywh
from mtl_rcnn.evaluation.coco_truth import coco_ground_truth, number_images
from mtl_rcnn.evaluation.evaluator import Metric, Row

__all__ = [
    "CocoScores",
    "coco_metrics",
    "coco_scores",
    "encode_masks",
    "xyxy_to_xywh",
]

_REGION_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
_KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
STATS = {"bbox": _REGION_STATS, "segm": _REGION_STATS, "keypoints": _KEYPOINT_STATS}
"""Names of the statistics of each score type, in the order of pycocotools' `COCOeval.stats`."""

_ALWAYS = ("AP", "AP50", "AP75", "AR")
_BY_SIZE = ("APs", "APm", "APl")

logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)


@dataclass(frozen=True)
class CocoScores:
    """Raw scores in 0..1, and -1 where there is no ground truth to score against.

    Attributes:
        stats: by name (`STATS`), equal to pycocotools' within 1e-12.
        per_class: category id -> {"AP", "AP50"}.
    """

    stats: Mapping[str, float]
    per_class: Mapping[int, Mapping[str, float]]


def coco_metrics(
    records: Sequence[Record],
    label_space: LabelSpace,
    rows: Sequence[Row],
    iou_type: str,
    *,
    classes: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> dict[str, Metric]:
    """COCO metrics of one dataset in percent (0..100, as Detectron2 prints them).

    `AP`, `AP50`, `AP75` and `AR` (at most 100 detections per image and class, 20 for keypoints) are always there: 0.0
    with a reason if there is nothing to score. `APs`, `APm`, `APl` (no `APs` for keypoints), `AP/<class>` and
    `AP50/<class>` are left out where the dataset has no ground truth of that size or class. How ground truth is read:
    `coco_ground_truth`.

    Args:
        records: all records of the dataset.
        rows: standard COCO results with the dataset's own image and category ids (see `coco_rows`).
        iou_type: "bbox", "segm" or "keypoints".
        classes: class indices to score, None for all; rows of other classes do not count. For keypoints these are the
            classes of one schema, since sigmas belong to a schema.
        sigmas: (K,) OKS sigmas, needed for "keypoints": COCO's convention, per-keypoint standard deviation relative to
            the root of the object's area.

    Raises:
        DataError: a row that is malformed or names an image or category that the dataset lacks, with its index.
    """
    if iou_type not in FIELDS:
        raise ValueError(f"iou_type is {iou_type!r}, expected one of {list(FIELDS)}")
    if (iou_type == "keypoints") != (sigmas is not None):
        raise ValueError("sigmas belong to iou_type 'keypoints', and are needed there")
    num_keypoints = len(sigmas) if sigmas is not None else 0
    truth = coco_ground_truth(records, label_space, iou_type, classes=classes, num_keypoints=num_keypoints)
    wanted = [category["id"] for category in truth["categories"]]
    reader = RowReader(records, number_images(records), label_space, wanted, iou_type, num_keypoints)
    scored = reader(rows)
    scores = coco_scores(truth, scored, iou_type, sigmas)
    return {**_overall(scores, truth, scored), **_per_class(scores, label_space, scored)}


def coco_scores(
    ground_truth: Mapping[str, Any], rows: Sequence[Row], iou_type: str, sigmas: Sequence[float] | None = None
) -> CocoScores:
    """Scores a COCO results list against a COCO dict, both with integer ids. The arguments are not changed.

    Args:
        ground_truth: {"images", "annotations", "categories"}; annotation ids are above 0.
        rows: each with the field of the score type; other geometry fields must be absent, as they change areas.
        iou_type: "bbox", "segm" or "keypoints".
        sigmas: (K,) OKS sigmas; None for COCO's 17.
    """
    names = STATS[iou_type]
    if not ground_truth["annotations"]:
        return CocoScores(dict.fromkeys(names, -1.0), {})
    truth = COCO(_copied(ground_truth), print_function=_quiet)
    results = truth.loadRes([dict(row) for row in rows])
    given = None if sigmas is None else list(sigmas)
    scorer = COCOeval_faster(truth, results, iou_type, print_function=_quiet, kpt_oks_sigmas=given)
    scorer.run()
    stats = {name: float(value) for name, value in zip(names, scorer.stats, strict=True)}
    return CocoScores(stats, _class_scores(scorer))


def _class_scores(scorer: COCOeval_faster) -> dict[int, dict[str, float]]:
    """Precision is (T, R, K, A, M): IoU threshold, recall, class, area range, maximum of detections."""
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    return {
        int(category_id): {"AP": _mean(precision[:, :, k]), "AP50": _mean(precision[0, :, k])}
        for k, category_id in enumerate(scorer.params.catIds)
    }


def _mean(precision: np.ndarray) -> float:
    """Mean of the entries that have ground truth, -1 if none has."""
    scored = precision[precision > -1]
    return float(scored.mean()) if scored.size else -1.0


def _overall(scores: CocoScores, truth: Mapping[str, Any], rows: Sequence[Row]) -> dict[str, Metric]:
    if scores.stats["AP"] < 0:
        reason = _no_truth_reason(truth)
        return {name: Metric(0.0, reason=reason) for name in _ALWAYS}
    reason = _zero_reason(scores, truth, rows)
    metrics = {name: Metric(100 * scores.stats[name], reason=reason) for name in _ALWAYS}
    for name in _BY_SIZE:
        if scores.stats.get(name, -1.0) >= 0:
            metrics[name] = Metric(100 * scores.stats[name], reason=reason)
    return metrics


def _no_truth_reason(truth: Mapping[str, Any]) -> str:
    images, regions = len(truth["images"]), len(truth["annotations"])
    return f"no ground truth in {images} images ({regions} crowd or unlabelled regions): nothing to score against"


def _zero_reason(scores: CocoScores, truth: Mapping[str, Any], rows: Sequence[Row]) -> str | None:
    images = len(truth["images"])
    if not rows:
        return f"no detections in {images} images"
    if scores.stats["AP50"] > 0:
        return None
    seen = len({row["image_id"] for row in rows})
    best = max(row["score"] for row in rows)
    return f"{len(rows)} detections in {seen} of {images} images (best score {best:.3f}), none matches at IoU 0.50"


def _per_class(scores: CocoScores, label_space: LabelSpace, rows: Sequence[Row]) -> dict[str, Metric]:
    detected = {row["category_id"] for row in rows}
    metrics = {}
    for name in ("AP", "AP50"):
        for index, values in scores.per_class.items():
            if values[name] >= 0:
                reason = None if index in detected else "no detections of this class"
                metrics[f"{name}/{label_space.classes[index]}"] = Metric(100 * values[name], reason=reason)
    return metrics


def _copied(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy down to the entries, to which the scorer adds fields."""
    return {key: [dict(entry) for entry in ground_truth[key]] for key in ("images", "annotations", "categories")}


def _quiet(*_: Any) -> None:
    """Takes the place of the library's print function."""
