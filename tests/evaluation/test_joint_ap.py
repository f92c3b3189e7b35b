"""Detections that must be right twice, against a slow reference, against pycocotools, and by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from coco_scenes import jittered_rows, random_truth
from test_coco_equals_pycocotools import reference as pycocotools_reference

from mtl_rcnn.evaluation.joint_ap import (
    THRESHOLDS,
    Encounter,
    Located,
    encounters,
    find_objects,
    joint_average_precision,
    label_f1,
)


def scene(seed: int, crowds: bool = True) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    rng = np.random.default_rng(seed)
    truth = random_truth(rng, images=14)
    if not crowds:
        truth["annotations"] = [entry for entry in truth["annotations"] if not entry["iscrowd"]]
    return truth, jittered_rows(rng, truth, "bbox")


def met_in(truth: dict[str, Any], rows: list[dict[str, Any]], unknown: frozenset[int] = frozenset()) -> dict[int, Any]:
    def located(entries: list[dict[str, Any]]) -> Located:
        ids, classes = (np.array([entry[key] for entry in entries]) for key in ("image_id", "category_id"))
        return Located(ids, classes, np.array([entry["bbox"] for entry in entries]).reshape(-1, 4))

    objects = truth["annotations"]
    ignored = np.array([entry["id"] in unknown for entry in objects])
    crowd = np.array([bool(entry["iscrowd"]) for entry in objects])
    scores = np.array([row["score"] for row in rows])
    return encounters(located(rows), scores, located(objects), ignored, crowd)


@pytest.mark.parametrize("seed", range(5))
def test_the_place_alone_gives_cocos_ap(seed: int) -> None:
    truth, rows = scene(seed)
    _, per_class = pycocotools_reference(truth, rows, "bbox")
    for category, met in met_in(truth, rows).items():
        found = joint_average_precision(met, agreements=np.zeros(1))
        assert (-1.0 if found is None else found.mean()) == pytest.approx(per_class[category], abs=1e-12)


def slow_f1(said: list[int], holds: list[int]) -> float:
    """scikit-learn's f1_score(holds, said, average="macro") on two lists of 0 and 1."""
    found = []
    for label in sorted({*said, *holds}):
        hits = sum(s == h == label for s, h in zip(said, holds))
        found.append(2 * hits / (said.count(label) + holds.count(label)))
    return sum(found) / len(found)


def slow_ap(images: list[tuple[list[dict], list[dict]]], least_iou: float, least_f1: float) -> float:
    """One class at one pair of thresholds, as fp_eval.py does it, in plain Python; (detections, objects) per image,
    where an unknown object is ignored."""
    results: list[tuple[float, int]] = []
    count = 0
    for detections, objects in images:
        objects = sorted(objects, key=lambda entry: entry["unknown"])
        count += sum(not entry["unknown"] for entry in objects)
        taken: set[int] = set()
        for detection in sorted(detections, key=lambda row: -row["score"])[:100]:
            iou, f1, best = min(least_iou, 1 - 1e-10), min(least_f1, 1 - 1e-10), None
            for index, entry in enumerate(objects):
                if index in taken:
                    continue
                if best is not None and not objects[best]["unknown"] and entry["unknown"]:
                    break
                here = slow_iou(detection["bbox"], entry["bbox"])
                alike = 1.0 if entry["unknown"] else slow_f1(detection["said"], entry["holds"])
                if here < iou or alike < f1:
                    continue
                iou, f1, best = here, alike, index
            if best is not None:
                taken.add(best)
            if best is None or not objects[best]["unknown"]:
                results.append((detection["score"], int(best is not None)))
    results.sort(key=lambda pair: -pair[0])
    points, hits = [], 0
    for number, (_, right) in enumerate(results, start=1):
        hits += right
        points.append((hits / count, hits / number))
    return sum(max((p for r, p in points if r >= recall), default=0.0) for recall in np.linspace(0, 1, 101)) / 101


def slow_iou(one: list[float], other: list[float]) -> float:
    width = min(one[0] + one[2], other[0] + other[2]) - max(one[0], other[0])
    height = min(one[1] + one[3], other[1] + other[3]) - max(one[1], other[1])
    common = max(width, 0) * max(height, 0)
    return common / (one[2] * one[3] + other[2] * other[3] - common)


@pytest.mark.parametrize("seed", range(3))
def test_both_conditions_equal_a_slow_reference(seed: int) -> None:
    truth, rows = scene(seed, crowds=False)
    rng = np.random.default_rng(seed)
    holds = rng.integers(0, 2, (len(truth["annotations"]), 6))
    unknown = frozenset(entry["id"] for entry in truth["annotations"] if rng.random() < 0.2)
    by_id = {entry["id"]: index for index, entry in enumerate(truth["annotations"])}
    said = np.empty((len(rows), 6), dtype=bool)
    for index, row in enumerate(rows):  # mostly what holds for some object of the image
        near = [e for e in truth["annotations"] if e["image_id"] == row["image_id"]] or truth["annotations"]
        said[index] = holds[by_id[near[rng.integers(len(near))]["id"]]] ^ (rng.random(6) < 0.15)
    values = np.where([[entry["id"] in unknown] for entry in truth["annotations"]], -1, holds)
    low = 0
    for category, met in met_in(truth, rows, unknown).items():
        f1s = [label_f1(said[one.detections], values[one.objects])[0] for one in met]
        found = joint_average_precision(met, f1s, THRESHOLDS[::3], THRESHOLDS[::2])
        images = []
        for image in truth["images"]:
            mine = [
                [entry | {"index": i} for i, entry in enumerate(part)
                 if (entry["image_id"], entry["category_id"]) == (image["id"], category)]
                for part in (rows, truth["annotations"])
            ]  # fmt: skip
            detections = [{**row, "said": said[row["index"]].astype(int).tolist()} for row in mine[0]]
            objects = [{**e, "holds": holds[e["index"]].tolist(), "unknown": e["id"] in unknown} for e in mine[1]]
            images.append((detections, objects))
        expected = [[slow_ap(images, t, f) for f in THRESHOLDS[::2]] for t in THRESHOLDS[::3]]
        np.testing.assert_allclose(found, expected, atol=1e-12)
        assert (np.diff(found, axis=1) <= 1e-12).mean() > 0.9, "stricter thresholds find less, as a rule"
        low += found.min() < found.max() - 0.02
    assert low >= 2


def test_f1_by_hand() -> None:
    truth = np.full((3, 294), 0)
    truth[0, :2] = 1
    truth[1, 0], truth[1, 5:] = 1, -1
    truth[2] = -1
    said = np.zeros((3, 294), dtype=bool)
    said[1, 0] = True
    said[2, :4] = True
    both, positive = label_f1(said, truth)
    # Nothing said of an object with 2 of 294 labels: F1 of what holds 0, of what does not 2 * 292 / (2 * 292 + 2).
    assert both[0, 0] == pytest.approx((0 + 584 / 586) / 2)
    assert positive[0, 0] == 0
    # One of the two said: 2 / 3, and 2 * 292 / (2 * 292 + 1).
    assert both[1, 0] == pytest.approx((2 / 3 + 584 / 585) / 2)
    assert positive[1, 0] == pytest.approx(2 / 3)
    # Only five entries are known of the second: all right; or one hit and three false ones, one rightly left out.
    assert (both[1, 1], positive[1, 1]) == (1, 1)
    assert positive[2, 1] == pytest.approx(2 / 5)
    assert both[2, 1] == pytest.approx((2 / 5 + 2 / 5) / 2)
    assert both[:, 2].tolist() == positive[:, 2].tolist() == [1, 1, 1]


def test_f1_equals_the_slow_one() -> None:
    rng = np.random.default_rng(0)
    said, truth = rng.random((20, 5)) < 0.3, (rng.random((20, 5)) < 0.3).astype(int)
    both, _ = label_f1(said, truth)
    expected = [[slow_f1(s.astype(int).tolist(), t.tolist()) for t in truth] for s in said]
    np.testing.assert_allclose(both, expected)


def test_nothing_holds_and_nothing_is_said() -> None:
    both, positive = label_f1(np.array([[False, False], [True, False]]), np.array([[0, 0]]))
    assert positive[:, 0].tolist() == [1, 0]
    assert both[:, 0].tolist() == pytest.approx([1, (0 + 2 / 3) / 2])


def encounter(scores: list[float], overlap: list[list[float]], ignored: list[bool], crowd: list[bool]) -> Encounter:
    found = np.array(overlap)
    order = np.arange(found.shape[0]), np.arange(found.shape[1])
    return Encounter(*order, np.array(scores), found, np.array(ignored, bool), np.array(crowd, bool))


def test_a_detection_takes_what_agrees_though_another_is_nearer() -> None:
    one = encounter([0.9, 0.8], [[0.9, 0.6], [0.8, 0.1]], [False, False], [False, False])
    agreement = np.array([[0.2, 1.0], [0.9, 0.9]])
    assert find_objects(one, agreement, np.array([0.5]), np.array([0.5]))[0, 0].tolist() == [1, 0]
    assert find_objects(one, None, np.array([0.5]), np.zeros(1))[0, 0].tolist() == [0, -1]


def test_ignored_objects_come_last_and_only_crowds_are_found_twice() -> None:
    one = encounter([0.9, 0.8, 0.7], [[0.9, 0.6]] * 3, [True, False], [False, False])
    assert find_objects(one, None, np.array([0.5]), np.zeros(1))[0, 0].tolist() == [1, 0, -1]
    crowded = encounter([0.9, 0.8, 0.7], [[0.9, 0.6]] * 3, [True, False], [True, False])
    assert find_objects(crowded, None, np.array([0.5]), np.zeros(1))[0, 0].tolist() == [1, 0, 0]


def test_average_precision_by_hand() -> None:
    # Two objects, three detections: right, wrong in its labels, right. Precision 1 up to recall 0.5, then 2/3.
    overlap = [[0.96, 0.0], [0.0, 0.96], [0.0, 0.96]]
    agreement = [np.array([[1.0, 0.0], [0.0, 0.3], [0.0, 0.8]])]
    met = [encounter([0.9, 0.8, 0.7], overlap, [False, False], [False, False])]
    found = joint_average_precision(met, agreement, np.array([0.5]), np.array([0.2, 0.5, 0.9]))
    assert found[0].tolist() == pytest.approx([1.0, (51 + 50 * 2 / 3) / 101, 51 / 101])
    assert joint_average_precision([encounter([0.5], np.zeros((1, 0)), [], [])]) is None
    nothing = [encounter([], np.zeros((0, 1)), [False], [False])]
    assert joint_average_precision(nothing).tolist() == [[0.0] * 10] * 10
