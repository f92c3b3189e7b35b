"""The same JSON gives the same numbers as pycocotools, on random scenes and on real annotations."""

from __future__ import annotations

import contextlib
import copy
import io
import json
import os
from pathlib import Path

import numpy as np
import pytest
from coco_scenes import jittered_rows, random_truth, records_of
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.evaluation.coco import STATS, coco_metrics, coco_scores

SIGMAS = [0.03, 0.05, 0.1, 0.02, 0.07]
REPOSITORY = Path(__file__).resolve().parents[2]
COCO_MINI = Path(os.environ.get("MTL_RCNN_DATA", REPOSITORY.parent / "shared" / "data")) / "coco_mini" / "annotations"


def reference(truth, rows, iou_type, sigmas=None):
    """pycocotools: (stats, AP per category id or -1)."""
    with contextlib.redirect_stdout(io.StringIO()):
        gt = COCO()
        gt.dataset = copy.deepcopy(truth)
        gt.createIndex()
        scorer = COCOeval(gt, gt.loadRes(copy.deepcopy(rows)), iou_type)
        if sigmas is not None:
            scorer.params.kpt_oks_sigmas = np.array(sigmas)
        scorer.evaluate()
        scorer.accumulate()
        scorer.summarize()
    precision = scorer.eval["precision"][:, :, :, 0, -1]
    per_class = [precision[:, :, k][precision[:, :, k] > -1] for k in range(precision.shape[2])]
    return scorer.stats, {
        category: float(values.mean()) if values.size else -1.0
        for category, values in zip(scorer.params.catIds, per_class, strict=True)
    }


def assert_equal(truth, rows, iou_type, sigmas=None):
    stats, per_class = reference(truth, rows, iou_type, sigmas)
    scores = coco_scores(truth, rows, iou_type, sigmas)
    for name, expected in zip(STATS[iou_type], stats, strict=True):
        assert scores.stats[name] == pytest.approx(expected, abs=1e-12), name
    for category, values in scores.per_class.items():
        assert values["AP"] == pytest.approx(per_class[category], abs=1e-12), category
    return scores


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_random_scenes(iou_type, seed):
    rng = np.random.default_rng(seed)
    truth = random_truth(rng)
    rows = jittered_rows(rng, truth, iou_type)
    before = json.dumps([truth, rows])

    scores = assert_equal(truth, rows, iou_type, SIGMAS if iou_type == "keypoints" else None)

    assert 0.02 < scores.stats["AP"] < 0.98
    assert json.dumps([truth, rows]) == before, "the arguments were changed"


@pytest.mark.parametrize("iou_type", ["bbox", "segm", "keypoints"])
def test_metrics_from_records_are_the_reference_in_percent(iou_type):
    rng = np.random.default_rng(11)
    truth = random_truth(rng, images=20)
    rows = jittered_rows(rng, truth, iou_type)
    sigmas = SIGMAS if iou_type == "keypoints" else None
    records, names = records_of(truth)
    label_space = LabelSpace(tuple({"name": name} for name in names))

    metrics = coco_metrics(records, label_space, rows, iou_type, sigmas=sigmas)

    stats, per_class = reference(truth, rows, iou_type, sigmas)
    stats = dict(zip(STATS[iou_type], stats, strict=True))
    shared = set(stats) & set(metrics)
    assert shared == {"AP", "AP50", "AP75", "AR", "APm", "APl"} | ({"APs"} if iou_type != "keypoints" else set())
    for name in shared:
        assert metrics[name].value == pytest.approx(100 * stats[name], abs=1e-10), name
    for category, ap in per_class.items():
        assert metrics[f"AP/class{(category - 2) // 5}"].value == pytest.approx(100 * ap, abs=1e-10)


@pytest.mark.skipif(not COCO_MINI.is_dir(), reason=f"no {COCO_MINI} (MTL_RCNN_DATA names its parent)")
@pytest.mark.parametrize(
    ("file", "iou_type"),
    [
        ("instances_val2017.json", "bbox"),
        ("instances_val2017.json", "segm"),
        ("person_keypoints_val2017.json", "keypoints"),
    ],
)
def test_real_annotations(file, iou_type):
    truth = json.loads((COCO_MINI / file).read_text())
    rng = np.random.default_rng(5)
    rows = jittered_rows(rng, truth, iou_type)

    scores = assert_equal(truth, rows, iou_type)

    assert 0.1 < scores.stats["AP"] < 0.98
