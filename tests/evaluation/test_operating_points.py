"""Matches against pycocotools' own, and the best F1 of each class against trying every threshold."""

from __future__ import annotations

import contextlib
import copy
import io

import numpy as np
import pytest
from coco_scenes import jittered_rows, random_truth, records_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.evaluation.coco import coco_metrics
from mtl_rcnn.evaluation.matching import CocoProblem, match
from mtl_rcnn.evaluation.operating_points import best_points, thresholds_of

SIGMAS = [0.03, 0.05, 0.1, 0.02, 0.07]


def reference(truth, rows, iou_type, limit):
    """pycocotools at 0.5: detections as (class, score, found an object), and the number of objects per class."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        scorer = COCOeval(gt, gt.loadRes(copy.deepcopy(rows)), iou_type)
        scorer.params.iouThrs, scorer.params.areaRng = np.array([0.5]), [[0, 1e10]]
        scorer.params.areaRngLbl, scorer.params.maxDets = ["all"], [limit]
        if iou_type == "keypoints":
            scorer.params.kpt_oks_sigmas = np.array(SIGMAS)
        scorer.evaluate()
    detections, objects = [], {}
    for entry in filter(None, scorer.evalImgs):
        category = entry["category_id"]
        objects[category] = objects.get(category, 0) + int((~np.array(entry["gtIgnore"], dtype=bool)).sum())
        for score, matched, ignored in zip(entry["dtScores"], entry["dtMatches"][0], entry["dtIgnore"][0]):
            if not ignored:
                detections.append((category, score, matched > 0))
    return detections, objects


def brute_force(detections, count):
    """(F1, threshold, precision, recall) of the best of all thresholds; the highest of equally good ones."""
    best = (0.0, None, 0.0, 0.0)
    for threshold in sorted({score for score, _ in detections}, reverse=True):
        taken = [found for score, found in detections if score >= threshold]
        precision, recall = sum(taken) / len(taken), sum(taken) / count
        f1 = 2 * precision * recall / (precision + recall) if sum(taken) else 0.0
        if f1 > best[0] + 1e-12:
            best = (f1, threshold, precision, recall)
    return best


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("iou_type", "limit"), [("bbox", 100), ("segm", 100), ("keypoints", 20)])
def test_f1_threshold_precision_and_recall_are_those_of_trying_every_threshold(iou_type, limit, seed):
    rng = np.random.default_rng(100 + seed)
    truth = random_truth(rng)
    rows = jittered_rows(rng, truth, iou_type)
    sigmas = SIGMAS if iou_type == "keypoints" else None

    points = best_points(match(CocoProblem(truth, rows, iou_type, sigmas)))

    detections, objects = reference(truth, rows, iou_type, limit)
    assert set(points) == {category for category, count in objects.items() if count}
    assert 0 < np.mean([point.f1 for point in points.values()]) < 1
    for category, point in points.items():
        own = [(score, found) for own_category, score, found in detections if own_category == category]
        f1, threshold, precision, recall = brute_force(own, objects[category])
        assert point.threshold == threshold
        assert (point.f1, point.precision, point.recall) == pytest.approx((f1, precision, recall), abs=1e-12)


def test_metrics_hold_the_points_in_percent_and_their_means():
    rng = np.random.default_rng(3)
    truth = random_truth(rng)
    rows = jittered_rows(rng, truth, "bbox")
    records, names = records_of(truth)
    points = best_points(match(CocoProblem(truth, rows, "bbox")))

    metrics = coco_metrics(records, LabelSpace(tuple({"name": name} for name in names)), rows, "bbox")

    categories = sorted(category["id"] for category in truth["categories"])
    for name, category in zip(names, categories):
        point = points[category]
        assert metrics[f"F1/{name}"].value == pytest.approx(100 * point.f1)
        assert metrics[f"precision/{name}"].value == pytest.approx(100 * point.precision)
        assert metrics[f"recall/{name}"].value == pytest.approx(100 * point.recall)
        assert metrics[f"score_threshold/{name}"].value == point.threshold
    assert metrics["F1"].value == pytest.approx(np.mean([100 * point.f1 for point in points.values()]))
    assert metrics["AR"].value == pytest.approx(np.mean([metrics[f"AR/{name}"].value for name in names]))


def test_detections_beyond_cocos_limit_do_not_count():
    box = [10.0, 10.0, 20.0, 20.0]
    truth = {
        "images": [{"id": 1, "height": 50, "width": 50}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 0, "bbox": box, "area": 400, "iscrowd": 0}],
        "categories": [{"id": 0, "name": "thing"}],
    }
    wrong = {"image_id": 1, "category_id": 0, "bbox": [40.0, 40.0, 5.0, 5.0], "score": 0.9}
    late = {"image_id": 1, "category_id": 0, "bbox": box, "score": 0.1}

    assert best_points(match(CocoProblem(truth, [wrong] * 99 + [late], "bbox")))[0].f1 > 0
    assert best_points(match(CocoProblem(truth, [wrong] * 100 + [late], "bbox")))[0].threshold is None


def test_a_class_that_finds_nothing_takes_the_threshold_of_all_together():
    box, away = [10.0, 10.0, 20.0, 20.0], [40.0, 40.0, 5.0, 5.0]
    truth = {
        "images": [{"id": 1, "height": 50, "width": 50}],
        "annotations": [
            {"id": n + 1, "image_id": 1, "category_id": n, "bbox": box, "area": 400, "iscrowd": 0} for n in (0, 1)
        ],
        "categories": [{"id": 0, "name": "cat"}, {"id": 1, "name": "dog"}],
    }
    rows = [
        {"image_id": 1, "category_id": 0, "bbox": box, "score": 0.7},
        {"image_id": 1, "category_id": 1, "bbox": away, "score": 0.8},
    ]
    matches = match(CocoProblem(truth, rows, "bbox"))

    assert best_points(matches)[1].threshold is None
    assert thresholds_of(best_points(matches), matches) == {0: 0.7, 1: 0.7}
