"""Datasets: specifications, label spaces over several datasets, filters that count, coverage."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path

import pytest
from toy import CATEGORIES, Toy, write_json

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.coverage import LabelRow, label_table
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, ImageTarget, Record
from mtl_rcnn.errors import ConfigError, DataError


def _spec(toy: Toy, **overrides) -> DatasetSpec:
    return DatasetSpec.from_config(toy.node(**overrides), str(toy.root), "data.train[0]")


def test_records_have_class_indices_and_know_their_own_ids(toy: Toy):
    (dataset,), space = build_datasets([_spec(toy)], {})
    assert space.classes == ("figure", "disc", "square")
    record = dataset.records[1]
    assert [a["category_id"] for a in record["annotations"]] == [0, 2]
    assert (record["classes"], record["category_ids"]) == ((0, 1, 2), (2, 5, 9))
    assert (record["image_id"], record["height"], record["width"]) == (12, 64, 48)
    assert record["tasks"] is None
    assert record["dataset"] == "toy"
    assert Path(record["file_name"]).is_file()
    assert str(dataset.report) == "kept all 6 images"


def test_tasks_and_extra_image_fields_reach_the_record(toy: Toy):
    content = json.loads(toy.boxes.read_text())
    content["images"][0].update(weather="rain", flickr_url="x")
    toy.boxes.write_text(json.dumps(content))
    (dataset,), _ = build_datasets([_spec(toy, tasks=["boxes"])], {})
    assert dataset.records[0]["tasks"] == ("boxes",)
    assert dataset.records[0]["weather"] == "rain"
    assert "flickr_url" not in dataset.records[0]


def test_chosen_classes_alone_make_the_label_space(toy: Toy):
    (dataset,), space = build_datasets([_spec(toy, classes=["square"])], {})
    assert space.classes == ("square",)
    assert [len(r["annotations"]) for r in dataset.records] == [0, 1, 0, 0, 2, 0]
    assert (dataset.records[0]["classes"], dataset.records[0]["category_ids"]) == ((0,), (9,))
    assert dataset.report.notes == ["7 annotations of classes that are not selected are left out"]


def test_filters_count_by_reason_and_say_so(toy: Toy, caplog: pytest.LogCaptureFixture):
    caplog.set_level(logging.INFO)
    (dataset,), _ = build_datasets([_spec(toy, image_ids=[11, 12, 14, 15], limit=2)], {}, min_instances=1)
    assert [r["image_id"] for r in dataset.records] == [11, 12]
    assert (
        "toy: kept 2 of 6 images; removed 4: not in image_ids (2), no instances (1), beyond limit (1)"
        in caplog.messages
    )
    assert dataset.report.kept == 2


def test_crowds_are_no_instances(toy: Toy):
    (dataset,), _ = build_datasets([_spec(toy)], {}, min_instances=2)
    assert [r["image_id"] for r in dataset.records] == [11, 12, 15]
    assert dataset.report.removed == {"fewer than 2 instances": 3}


def test_nothing_is_removed_by_default(toy: Toy):
    (dataset,), _ = build_datasets([_spec(toy, annotations="points.json")], {})
    assert len(dataset.records) == 6


def test_two_datasets_merge_by_name_and_know_what_they_label(toy: Toy):
    other = [{"id": 1, "name": "circle"}, {"id": 2, "name": "star"}]
    images = [{"id": 11, "file_name": "11.png", "height": 48, "width": 64}]
    write_json(
        toy.root / "other.json", images, [{"id": 1, "image_id": 11, "category_id": 1, "bbox": [1, 1, 5, 5]}], other
    )
    specs = [_spec(toy), _spec(toy, name="other", annotations="other.json")]
    datasets, space = build_datasets(specs, {"circle": "disc"})
    assert space.classes == ("figure", "disc", "square", "star")
    record = datasets[1].records[0]
    assert record["annotations"][0]["category_id"] == 1
    assert (record["classes"], record["category_ids"]) == ((1, 3), (1, 2))
    assert record["annotations"][0]["iscrowd"] == 0


def test_evaluation_maps_to_a_given_label_space(toy: Toy):
    space = LabelSpace(({"name": "square"}, {"name": "disc"}, {"name": "figure"}))
    (dataset,), same = build_datasets([_spec(toy)], {}, space)
    assert same is space
    assert (dataset.records[0]["classes"], dataset.records[0]["category_ids"]) == ((0, 1, 2), (9, 5, 2))


def test_annotated_class_unknown_to_the_network_is_an_error(toy: Toy):
    space = LabelSpace(({"name": "figure"},))
    expected = r"'toy'.*network does not know: disc \(3 annotations\), square \(3 annotations\).*network knows figure"
    with pytest.raises(DataError, match=expected):
        build_datasets([_spec(toy)], {}, space)


def test_unknown_category_without_annotations_is_noted(toy: Toy):
    content = json.loads(toy.boxes.read_text())
    content["categories"].append({"id": 20, "name": "star"})
    toy.boxes.write_text(json.dumps(content))
    space = LabelSpace(tuple({"name": c["name"]} for c in CATEGORIES))
    (dataset,), _ = build_datasets([_spec(toy)], {}, space)
    assert dataset.report.notes == ["categories unknown to the network (without annotations here): star"]


def test_other_schema_than_the_network_is_an_error(toy: Toy):
    space = LabelSpace(({"name": "figure", "keypoints": ["nose"]}, {"name": "disc"}, {"name": "square"}))
    with pytest.raises(DataError, match=r"'figure'.*'of the network' and 'toy'.*'keypoints'"):
        build_datasets([_spec(toy)], {}, space)


def test_missing_images_are_counted_and_the_first_named(toy: Toy):
    for name in ("12.png", "15.png"):
        (toy.images / name).unlink()
    with pytest.raises(DataError, match=r"2 of 6 image files are missing, the first is .*12\.png \(image id 12\)"):
        build_datasets([_spec(toy)], {})
    (dataset,), _ = build_datasets([_spec(toy)], {}, on_error="skip")
    assert str(dataset.report) == "kept 4 of 6 images; removed 2: image file missing (2)"
    assert "12.png" in dataset.report.notes[0]
    assert "15.png" in dataset.report.notes[0]


def test_missing_folder_is_an_error_even_when_skipping(toy: Toy):
    with pytest.raises(DataError, match=r"no image folder .*imagess"):
        build_datasets([_spec(toy, images="imagess")], {}, on_error="skip")


def test_empty_boxes_are_kept_and_named(toy: Toy):
    content = json.loads(toy.boxes.read_text())
    content["annotations"][3]["bbox"][3] = 0
    toy.boxes.write_text(json.dumps(content))
    (dataset,), _ = build_datasets([_spec(toy)], {})
    assert len(dataset.records[1]["annotations"]) == 2
    assert dataset.report.notes == ["1 annotations have a box without width or height and train nothing: ids 104"]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"imagess": 1}, r"data\.train\[0\]\.imagess: unknown key \(did you mean 'images'\?\)"),
        ({"annotations": None}, r"data\.train\[0\]\.annotations: missing"),
        ({"limit": 0}, r"data\.train\[0\]\.limit=0"),
        ({"tasks": "boxes"}, r"data\.train\[0\]\.tasks=boxes: expected null or a list"),
        ({"classes": []}, r"data\.train\[0\]\.classes=\[\]"),
    ],
)
def test_malformed_specification_names_its_key(toy: Toy, overrides: dict, expected: str):
    with pytest.raises(ConfigError, match=expected):
        _spec(toy, **overrides)


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ({"classes": ["discs"]}, r"'discs', which is no category of .*boxes\.json \(did you mean 'disc'\?\)"),
        ({"image_ids": [11, 99]}, r"image_ids names 99.*\(1 of 2 are unknown\)"),
    ],
)
def test_specification_that_does_not_fit_its_files(toy: Toy, overrides: dict, expected: str):
    with pytest.raises(ConfigError, match=expected):
        build_datasets([_spec(toy, **overrides)], {})


def test_names_must_differ(toy: Toy):
    with pytest.raises(ConfigError, match="two datasets are named 'toy'"):
        build_datasets([_spec(toy), _spec(toy)], {})


class _PointsTarget(ImageTarget):
    """Counts instances with points; a point list of another length than 9 is a fault."""

    def check(self, record: Record) -> Coverage:
        points = [a["keypoints"] for a in record["annotations"] if "keypoints" in a]
        if any(len(entry) != 9 for entry in points):
            raise DataError(f"image {record['image_id']}: not 9 numbers")
        return Coverage(image=bool(points), instances=len(points))

    def load(self, record, geometry):
        return None

    def as_prediction(self, sample):
        return {}

    def draw(self, canvas, prediction):
        return None


def test_label_table_counts_and_collects_faults(toy: Toy):
    datasets, space = build_datasets([_spec(toy)], {})
    targets = {"points": _PointsTarget("points", space)}
    assert label_table(datasets, targets) == [LabelRow("toy", "points", 4, 6, 4, 9)]
    faulty = [*datasets[0].records]
    for record in (faulty[0], faulty[4]):
        record["annotations"][0]["keypoints"].append(0)
    with pytest.raises(DataError, match=r"image 11: not 9 numbers \(1 more images of dataset 'toy'"):
        label_table([replace(datasets[0], records=faulty)], targets)
