"""Why an AP is next to nothing, as rows and ground truth show it: one seeded fault each."""

from __future__ import annotations

import json

import numpy as np
import pytest
from coco_scenes import jittered_rows, random_truth, records_of

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import DataError
from mtl_rcnn.evaluation.coco import coco_metrics
from mtl_rcnn.evaluation.coco_evaluator import CocoEvaluator, View
from mtl_rcnn.evaluation.results import evaluate_rows


class Boxes(CocoEvaluator):
    def rows(self, record, prediction):
        raise NotImplementedError

    def views(self):
        return [View("bbox")]


@pytest.fixture
def scene():
    """(records, label space, good rows)"""
    rng = np.random.default_rng(1)
    truth = random_truth(rng, images=12)
    records, names = records_of(truth)
    return records, LabelSpace(tuple({"name": name} for name in names)), jittered_rows(rng, truth, "bbox")


def test_a_good_result_needs_no_explanation(scene):
    records, label_space, rows = scene
    metrics = coco_metrics(records, label_space, rows, "bbox")
    assert metrics["AP"].value > 10
    assert metrics["AP"].reason is None


def test_no_detections(scene):
    records, label_space, _ = scene
    assert coco_metrics(records, label_space, [], "bbox")["AP"].reason == "no detections in 12 images"


def test_a_wrong_class_map_is_told_by_what_happens_without_classes(scene):
    records, label_space, rows = scene
    ids = records[0]["category_ids"]
    shifted = [{**row, "category_id": ids[(ids.index(row["category_id"]) + 1) % len(ids)]} for row in rows]

    metrics = coco_metrics(records, label_space, shifted, "bbox")

    assert metrics["AP"].value < 1
    reason = metrics["AP"].reason
    assert reason.startswith("right places, wrong classes: AP50 is ")
    assert "Are the classes (category ids) of the detections those of the dataset?" in reason
    first, second = label_space.classes[:2]
    assert f"'{first}' is detected as '{second}'" in reason


def test_right_classes_in_wrong_places_are_not_taken_for_a_wrong_class_map(scene):
    records, label_space, rows = scene
    moved = [{**row, "bbox": [row["bbox"][0] + 500, *row["bbox"][1:]]} for row in rows]
    reason = coco_metrics(records, label_space, moved, "bbox")["AP"].reason
    assert "none matches at IoU 0.50" in reason
    assert "wrong classes" not in reason


def test_empty_truth(scene):
    records, label_space, rows = scene
    bare = [{**record, "annotations": []} for record in records]
    reason = coco_metrics(bare, label_space, rows, "bbox")["AP"].reason
    assert reason == "no ground truth in 12 images (0 crowd or unlabelled regions): nothing to score against"


def test_image_ids_that_do_not_overlap_are_counted(scene, tmp_path):
    records, label_space, rows = scene
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{**row, "image_id": row["image_id"] + 100_000} for row in rows]))
    named = len({row["image_id"] for row in rows})
    with pytest.raises(DataError, match=rf"0/{named} of the file's image ids are in the dataset: .* another dataset"):
        evaluate_rows(Boxes("boxes", label_space, records), path)
