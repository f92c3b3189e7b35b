"""COCO metrics of one dataset and score type, from the dataset's records and the rows of a results file."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record
from mtl_rcnn.evaluation.coco_rows import FIELDS, RowReader, encode_masks, xyxy_to_xywh
from mtl_rcnn.evaluation.coco_scores import STATS, CocoScores, coco_scores
from mtl_rcnn.evaluation.coco_truth import coco_ground_truth, number_images
from mtl_rcnn.evaluation.diagnosis import low_reason
from mtl_rcnn.evaluation.evaluator import THRESHOLD, Metric, Row
from mtl_rcnn.evaluation.matching import CocoProblem, Matches, match
from mtl_rcnn.evaluation.operating_points import OperatingPoint, best_points

__all__ = [
    "STATS",
    "CocoResult",
    "coco_metrics",
    "coco_result",
    "coco_scores",
    "encode_masks",
    "xyxy_to_xywh",
]

_ALWAYS = ("AP", "AP50", "AP75", "AR")
_BY_SIZE = ("APs", "APm", "APl")
_PER_CLASS = ("AP", "AP50", "AR")
_POINT = ("F1", "precision", "recall")


@dataclass(frozen=True)
class CocoResult:
    """Everything that scoring once finds out.

    Attributes:
        metrics: see `coco_metrics`.
        problem, scores, matches: what they were made of.
        points: class index -> its best operating point, of the classes that have ground truth.
    """

    metrics: dict[str, Metric]
    problem: CocoProblem
    scores: CocoScores
    matches: Matches
    points: Mapping[int, OperatingPoint]


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
    with a reason if there is nothing to score. `APs`, `APm`, `APl` (no `APs` for keypoints) and everything per class
    (`AP/<class>`, `AP50/<class>`, `AR/<class>`, `F1/<class>` ...) are left out where the dataset has no ground truth of
    that size or class. How ground truth is read: `coco_ground_truth`.

    `F1/<class>`, `precision/<class>` and `recall/<class>` are those of the detections with at least
    `score_threshold/<class>` (0..1), at a similarity of 0.5; the threshold is the one of highest F1, and missing where
    no detection finds anything. `F1`, `precision` and `recall` are the means over the classes.

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
    return coco_result(records, label_space, rows, iou_type, classes=classes, sigmas=sigmas).metrics


def coco_result(
    records: Sequence[Record],
    label_space: LabelSpace,
    rows: Sequence[Row],
    iou_type: str,
    *,
    classes: Sequence[int] | None = None,
    sigmas: Sequence[float] | None = None,
) -> CocoResult:
    """As `coco_metrics`, with what the metrics were made of."""
    if iou_type not in FIELDS:
        raise ValueError(f"iou_type is {iou_type!r}, expected one of {list(FIELDS)}")
    if (iou_type == "keypoints") != (sigmas is not None):
        raise ValueError("sigmas belong to iou_type 'keypoints', and are needed there")
    num_keypoints = len(sigmas) if sigmas is not None else 0
    truth = coco_ground_truth(records, label_space, iou_type, classes=classes, num_keypoints=num_keypoints)
    wanted = [category["id"] for category in truth["categories"]]
    reader = RowReader(records, number_images(records), label_space, wanted, iou_type, num_keypoints)
    problem = CocoProblem(truth, reader(rows), iou_type, sigmas)
    scores = coco_scores(problem.truth, problem.rows, iou_type, sigmas)
    matches = match(problem)
    points = {index: point for index, point in best_points(matches).items() if index in scores.curves}
    metrics = {
        **_overall(problem, scores, points, label_space),
        **_per_class(problem, scores, points, label_space),
    }
    return CocoResult(metrics, problem, scores, matches, points)


def nothing_to_score(reason: str) -> dict[str, Metric]:
    """The metrics that are always there, where there is nothing to measure."""
    return {name: Metric(0.0, reason=reason) for name in _ALWAYS}


def _overall(
    problem: CocoProblem, scores: CocoScores, points: Mapping[int, OperatingPoint], label_space: LabelSpace
) -> dict[str, Metric]:
    reason = low_reason(problem, scores, label_space.classes)
    if scores.stats["AP"] < 0:
        return nothing_to_score(reason or "")
    metrics = {name: Metric(100 * scores.stats[name], reason=reason) for name in _ALWAYS}
    for name in _BY_SIZE:
        if scores.stats.get(name, -1.0) >= 0:
            metrics[name] = Metric(100 * scores.stats[name], reason=reason)
    for name in _POINT:
        values = [_point_value(point, name) for point in points.values()]
        if values:
            metrics[name] = Metric(sum(values) / len(values), reason=reason)
    return metrics


def _per_class(
    problem: CocoProblem, scores: CocoScores, points: Mapping[int, OperatingPoint], label_space: LabelSpace
) -> dict[str, Metric]:
    detected = {row["category_id"] for row in problem.rows}
    reasons = {index: None if index in detected else "no detections of this class" for index in scores.per_class}
    metrics = {
        f"{name}/{label_space.classes[index]}": Metric(100 * values[name], reason=reasons[index])
        for name in _PER_CLASS
        for index, values in scores.per_class.items()
        if values[name] >= 0
    }
    for name in _POINT:
        for index, point in points.items():
            metrics[f"{name}/{label_space.classes[index]}"] = Metric(_point_value(point, name), reason=reasons[index])
    for index, point in points.items():
        if point.threshold is not None:
            metrics[f"{THRESHOLD}/{label_space.classes[index]}"] = Metric(point.threshold)
    return metrics


def _point_value(point: OperatingPoint, name: str) -> float:
    """In percent."""
    return 100 * getattr(point, name.lower())
