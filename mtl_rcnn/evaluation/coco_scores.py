"""COCO's statistics with faster-coco-eval; numbers equal pycocotools' on the same JSON."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from faster_coco_eval import COCO, COCOeval_faster

from mtl_rcnn.evaluation.evaluator import Row

_REGION_STATS = ("AP", "AP50", "AP75", "APs", "APm", "APl", "AR1", "AR10", "AR", "ARs", "ARm", "ARl")
_KEYPOINT_STATS = ("AP", "AP50", "AP75", "APm", "APl", "AR", "AR50", "AR75", "ARm", "ARl")
STATS = {"bbox": _REGION_STATS, "segm": _REGION_STATS, "keypoints": _KEYPOINT_STATS}
"""Names of the statistics of each score type, in the order of pycocotools' `COCOeval.stats`."""

logging.getLogger("faster_coco_eval").setLevel(logging.WARNING)


@dataclass(frozen=True)
class Curve:
    """Precision over recall of one class at a similarity of 0.5, as COCO's AP50 averages it.

    Attributes:
        recall: (101,) 0, 0.01 ... 1.
        precision: (101,) in 0..1: the best precision at this recall or a higher one; 0 where it is not reached.
        score: (101,) the least score of the detections that reach the recall; 0 where it is not reached.
    """

    recall: np.ndarray
    precision: np.ndarray
    score: np.ndarray


@dataclass(frozen=True)
class CocoScores:
    """Raw scores in 0..1, and -1 where there is no ground truth to score against.

    Attributes:
        stats: by name (`STATS`), equal to pycocotools' within 1e-12.
        per_class: category id -> {"AP", "AP50", "AR"}.
        curves: category id -> curve, of the categories that have ground truth.
    """

    stats: Mapping[str, float]
    per_class: Mapping[int, Mapping[str, float]]
    curves: Mapping[int, Curve] = field(default_factory=dict)


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
    scorer = make_scorer(ground_truth, rows, iou_type, sigmas)
    scorer.run()
    stats = {name: float(value) for name, value in zip(names, scorer.stats, strict=True)}
    per_class = _class_scores(scorer)
    return CocoScores(stats, per_class, _curves(scorer))


def make_scorer(
    ground_truth: Mapping[str, Any], rows: Sequence[Row], iou_type: str, sigmas: Sequence[float] | None
) -> COCOeval_faster:
    """faster-coco-eval's scorer of copies of the arguments (see `coco_scores`), which have annotations. Detections are
    numbered from 1 in the order of the rows."""
    truth = COCO(_copied(ground_truth), print_function=_quiet)
    results = truth.loadRes([dict(row) for row in rows])
    given = None if sigmas is None else list(sigmas)
    return COCOeval_faster(truth, results, iou_type, print_function=_quiet, kpt_oks_sigmas=given)


def _class_scores(scorer: COCOeval_faster) -> dict[int, dict[str, float]]:
    """Precision is (T, R, K, A, M): similarity threshold, recall, class, area range, maximum of detections; recall
    is (T, K, A, M)."""
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    recall = scorer.eval["recall"][:, :, 0, -1]
    return {
        int(category_id): {
            "AP": _mean(precision[:, :, k]),
            "AP50": _mean(precision[0, :, k]),
            "AR": _mean(recall[:, k]),
        }
        for k, category_id in enumerate(scorer.params.catIds)
    }


def _curves(scorer: COCOeval_faster) -> dict[int, Curve]:
    precision, scores = (scorer.eval[name][0, :, :, 0, -1] for name in ("precision", "scores"))
    return {
        int(category_id): Curve(np.array(scorer.params.recThrs), precision[:, k].copy(), scores[:, k].copy())
        for k, category_id in enumerate(scorer.params.catIds)
        if (precision[:, k] > -1).all()
    }


def _mean(values: np.ndarray) -> float:
    """Mean of the entries that have ground truth, -1 if none has."""
    scored = values[values > -1]
    return float(scored.mean()) if scored.size else -1.0


def _copied(ground_truth: Mapping[str, Any]) -> dict[str, Any]:
    """A copy down to the entries, to which the scorer adds fields."""
    return {key: [dict(entry) for entry in ground_truth[key]] for key in ("images", "annotations", "categories")}


def _quiet(*_: Any) -> None:
    """Takes the place of the library's print function."""
