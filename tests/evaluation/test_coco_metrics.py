"""What COCO metrics say when something is missing: detections, ground truth, labels, ids."""

from __future__ import annotations

import math

import pytest
import torch
from pycocotools import mask as mask_api

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import DataError
from mtl_rcnn.evaluation.coco import coco_metrics, encode_masks, xyxy_to_xywh
from mtl_rcnn.evaluation.evaluator import dataset_category_id

LABELS = LabelSpace(({"name": "cat"}, {"name": "dog"}, {"name": "cow"}))
SIGMAS = [0.1, 0.1]


def annotation(number, class_index, box, **fields):
    return {"id": number, "category_id": class_index, "bbox": box, "iscrowd": 0, **fields}


def record(image_id, annotations, **fields):
    base = {"file_name": f"{image_id}.jpg", "height": 100, "width": 200, "image_id": image_id, "dataset": "toy"}
    return {**base, "classes": (0, 1), "category_ids": (17, 18), "annotations": annotations, **fields}


def row(image_id, category_id, score=0.9, **fields):
    return {"image_id": image_id, "category_id": category_id, "score": score, **fields}


def two_images():
    return [
        record("left", [annotation(1, 0, [10, 10, 50, 40]), annotation(2, 1, [100, 20, 60, 60])]),
        record("right", [annotation(3, 0, [5, 5, 90, 90])]),
    ]


def perfect_rows():
    boxes = [("left", 17, [10, 10, 50, 40]), ("left", 18, [100, 20, 60, 60]), ("right", 17, [5, 5, 90, 90])]
    return [row(image_id, category_id, bbox=box) for image_id, category_id, box in boxes]


def test_ground_truth_as_detections_is_perfect_with_text_image_ids_and_own_category_ids():
    metrics = coco_metrics(two_images(), LABELS, perfect_rows(), "bbox")

    assert metrics["AP"].value == pytest.approx(100)
    assert metrics["AP/cat"].value == metrics["AP50/dog"].value == pytest.approx(100)
    assert "AP/cow" not in metrics, "the dataset has no cows: no score, and no part in the mean"
    assert "APs" not in metrics, "no small object"
    assert metrics["APm"].value == pytest.approx(100)
    assert all(metric.reason is None and metric.higher_is_better for metric in metrics.values())


def test_no_detections_are_zero_with_a_reason():
    metrics = coco_metrics(two_images(), LABELS, [], "bbox")

    assert {name for name in metrics if "/" not in name} == {
        *("AP", "AP50", "AP75", "AR", "APm", "F1", "precision", "recall")
    }
    assert all(metric.value == 0.0 for metric in metrics.values())
    assert metrics["AP"].reason == "no detections in 2 images"
    assert metrics["AP/dog"].reason == "no detections of this class"


def test_no_ground_truth_is_zero_with_a_reason():
    crowd = annotation(1, 0, [10, 10, 50, 40], iscrowd=1)
    for records in ([record(1, []), record(2, [])], [record(1, [crowd])]):
        metrics = coco_metrics(records, LABELS, [row(1, 17, bbox=[0, 0, 5, 5])], "bbox")

        assert set(metrics) == {"AP", "AP50", "AP75", "AR"}
        assert all(metric.value == 0.0 and "no ground truth" in metric.reason for metric in metrics.values())


def test_detections_that_match_nothing_say_so():
    rows = [row("left", 17, 0.5, bbox=[150, 60, 20, 20])]

    assert coco_metrics(two_images(), LABELS, rows, "bbox")["AP"].reason == (
        "1 detections in 1 of 2 images (best score 0.500), none matches at IoU 0.50"
    )


def test_only_the_given_classes_count():
    wrong_dog = row("left", 18, 0.99, bbox=[0, 0, 5, 5])
    both = coco_metrics(two_images(), LABELS, [*perfect_rows(), wrong_dog], "bbox")
    cats = coco_metrics(two_images(), LABELS, [*perfect_rows(), wrong_dog], "bbox", classes=[0])

    assert both["AP"].value < 80
    assert cats["AP"].value == pytest.approx(100)
    assert [name for name in cats if "/" in name] == [
        *("AP/cat", "AP50/cat", "AR/cat", "F1/cat", "precision/cat", "recall/cat", "score_threshold/cat")
    ]


def test_a_box_without_mask_is_neither_a_miss_nor_a_false_alarm():
    square = [[10, 10, 60, 10, 60, 50, 10, 50]]
    records = [
        record(1, [annotation(1, 0, [10, 10, 50, 40], segmentation=square), annotation(2, 0, [100, 20, 60, 60])])
    ]
    found, unlabelled = torch.zeros(2, 100, 200, dtype=torch.bool)
    found[10:50, 10:60] = True
    unlabelled[30:70, 110:150] = True
    rows = [
        row(1, 17, s, segmentation=rle) for s, rle in zip((0.5, 0.9), encode_masks(torch.stack([found, unlabelled])))
    ]

    assert coco_metrics(records, LABELS, rows, "segm")["AP"].value == pytest.approx(100)


def test_area_comes_from_the_annotation_then_the_mask_then_the_box():
    triangle = [[0, 0, 60, 0, 0, 60]]
    box = [0, 0, 60, 60]
    sizes = {}
    for name, fields in {
        "given": {"area": 10, "segmentation": triangle},
        "mask": {"segmentation": triangle},
        "box": {},
    }.items():
        metrics = coco_metrics([record(1, [annotation(1, 0, box, **fields)])], LABELS, [row(1, 17, bbox=box)], "bbox")
        sizes[name] = {key for key in metrics if key in ("APs", "APm", "APl")}
    assert sizes == {"given": {"APs"}, "mask": {"APm"}, "box": {"APm"}}

    narrow = record(1, [annotation(1, 0, box, segmentation=[[0, 0, 60, 0, 0, 30]])])
    assert "APs" in coco_metrics([narrow], LABELS, [row(1, 17, bbox=box)], "bbox"), "900 pixels of mask, 3600 of box"


def test_keypoints_without_labels_are_ignore_regions_and_counts_are_made_up_for():
    labelled = annotation(1, 0, [10, 10, 50, 40], keypoints=[20, 20, 2, 50, 40, 1])
    bare = annotation(2, 0, [100, 20, 60, 60])
    zero = annotation(3, 0, [5, 60, 30, 30], keypoints=[0] * 6, num_keypoints=0)
    rows = [
        row(1, 17, 0.4, keypoints=[20, 20, 1.0, 50, 40, 1.0]),
        row(1, 17, 0.9, keypoints=[110, 30, 1.0, 150, 70, 1.0]),
        row(1, 17, 0.8, keypoints=[10, 65, 1.0, 20, 70, 1.0]),
    ]

    metrics = coco_metrics([record(1, [labelled, bare, zero])], LABELS, rows, "keypoints", classes=[0], sigmas=SIGMAS)

    assert metrics["AP"].value == pytest.approx(100)
    assert "APs" not in metrics


def test_keypoints_of_the_wrong_length_name_the_annotation():
    records = [record(1, [annotation(31, 0, [10, 10, 50, 40], keypoints=[20, 20, 2])])]

    with pytest.raises(DataError, match=r"1\.jpg: image 1, annotation 31: 'keypoints' has 3 numbers, expected 6"):
        coco_metrics(records, LABELS, [], "keypoints", sigmas=SIGMAS)


@pytest.mark.parametrize(
    ("bad", "iou_type", "text"),
    [
        ("text", "bbox", "expected an object with image_id"),
        (row("left", 17), "bbox", "'bbox' is missing"),
        (
            row("middle", 17, bbox=[0, 0, 1, 1]),
            "bbox",
            "image_id 'middle' is not in the dataset; it has 2 image ids such as",
        ),
        (
            row("left", 3, bbox=[0, 0, 1, 1]),
            "bbox",
            "category_id 3 is not in the dataset; it has 2 category ids such as 17",
        ),
        (row("left", 17, math.nan, bbox=[0, 0, 1, 1]), "bbox", "'score' is nan, expected a finite number"),
        (row("left", 17, bbox=[0, 0, 1]), "bbox", r"'bbox' is \[0, 0, 1\], expected \[x, y, width, height\]"),
        (row("left", 17, segmentation=[[0, 0, 1, 1, 2, 2]]), "segm", r"expected an RLE \{'size': \[100, 200\]"),
        (row("left", 17, segmentation={"size": [9, 9], "counts": "1"}), "segm", r"has size \[9, 9\], the image has"),
        (row("left", 17, segmentation={"size": [100, 200], "counts": "no!"}), "segm", "counts that cannot be decoded"),
        (row("left", 17, keypoints=[1, 2, 3]), "keypoints", "expected 6 numbers: 2 x"),
    ],
)
def test_a_bad_row_is_named(bad, iou_type, text):
    good = {"bbox": perfect_rows()[:1]}.get(iou_type, [])
    sigmas = SIGMAS if iou_type == "keypoints" else None

    with pytest.raises(DataError, match=rf"results row {len(good)} of dataset 'toy': .*{text}"):
        coco_metrics(two_images(), LABELS, [*good, bad], iou_type, sigmas=sigmas)


def test_rows_of_another_keypoint_schema_are_left_alone():
    records = [record(1, [annotation(1, 0, [10, 10, 50, 40], keypoints=[20, 20, 2, 50, 40, 1])])]
    rows = [row(1, 17, keypoints=[20, 20, 1, 50, 40, 1]), row(1, 18, keypoints=[20, 20, 1])]

    assert coco_metrics(records, LABELS, rows, "keypoints", classes=[0], sigmas=SIGMAS)["AP"].value == pytest.approx(
        100
    )


def test_duplicate_image_ids_and_mixed_numberings_are_refused():
    with pytest.raises(DataError, match="image id 4 occurs twice"):
        coco_metrics([record(4, []), record(4, [])], LABELS, [], "bbox")
    with pytest.raises(DataError, match="images 4 and 5 number their categories differently"):
        coco_metrics([record(4, []), record(5, [], category_ids=(1, 2))], LABELS, [], "bbox")


def test_records_without_category_ids_use_class_indices():
    bare = {key: value for key, value in two_images()[1].items() if key != "category_ids"}

    assert dataset_category_id(bare, 2) == 2
    assert dataset_category_id(two_images()[0], 2) is None
    assert coco_metrics([bare], LABELS, [row("right", 0, bbox=[5, 5, 90, 90])], "bbox")["AP"].value == pytest.approx(
        100
    )


def test_scoring_is_quiet(capfd, caplog):
    caplog.set_level("DEBUG")
    coco_metrics(two_images(), LABELS, perfect_rows(), "bbox")

    assert capfd.readouterr() == ("", "")
    assert caplog.records == []


def test_masks_survive_encoding():
    masks = torch.rand(3, 7, 11, generator=torch.Generator().manual_seed(0)) > 0.5
    rles = encode_masks(masks)

    assert [type(rle["counts"]) for rle in rles] == [str] * 3
    assert rles[0]["size"] == [7, 11]
    decoded = torch.stack([torch.from_numpy(mask_api.decode(rle)) for rle in rles]).bool()
    assert torch.equal(decoded, masks)
    assert encode_masks(masks[:0]) == []


def test_boxes_become_corner_and_size():
    assert xyxy_to_xywh(torch.tensor([[1.0, 2.0, 4.5, 8.0]])) == [[1.0, 2.0, 3.5, 6.0]]
    assert xyxy_to_xywh(torch.zeros(0, 4)) == []
