"""COCO files: merging by annotation id, and one clear error for every fault."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from toy import CATEGORIES, SIZES, Toy, toy_annotations

from mtl_rcnn.data.coco import read_coco
from mtl_rcnn.errors import DataError

Edit = Callable[[dict[str, Any]], Any]


def _edit(path: Path, edit: Edit) -> Path:
    content = json.loads(path.read_text())
    edit(content)
    path.write_text(json.dumps(content))
    return path


def test_files_merge_by_annotation_id(toy: Toy):
    data = read_coco([toy.boxes, toy.points])
    assert list(data.images) == list(SIZES)
    assert [a for image in data.annotations.values() for a in image] == toy_annotations()
    assert list(data.categories) == CATEGORIES
    assert data.notes == ()


def test_the_order_of_files_does_not_matter_to_the_content(toy: Toy):
    def by_id(paths: list[Path]) -> dict:
        return {a["id"]: a for entries in read_coco(paths).annotations.values() for a in entries}

    assert by_id([toy.points, toy.boxes]) == by_id([toy.boxes, toy.points])


def test_images_without_annotations_are_kept(toy: Toy):
    assert read_coco([toy.boxes]).annotations[14] == []


def test_rounding_differences_are_no_contradiction(toy: Toy):
    def blur(content: dict) -> None:
        content["annotations"][0]["area"] += 1e-6
        content["annotations"][0]["bbox"][0] += 0.01

    data = read_coco([toy.boxes, _edit(toy.points, blur)])
    assert data.annotations[11][0]["bbox"] == [8, 6, 20, 30]
    assert data.notes == ()


def test_other_differences_are_reported(toy: Toy):
    _edit(toy.points, lambda content: content["annotations"][0].update(area=1))
    data = read_coco([toy.boxes, toy.points])
    assert data.annotations[11][0]["area"] == 600
    assert "1 entries differ in annotation field 'area'" in data.notes[0]


def test_files_of_other_images_are_united_and_reported(toy: Toy):
    _edit(toy.points, lambda content: content["images"].pop(3))
    data = read_coco([toy.boxes, toy.points])
    assert len(data.images) == 6
    assert data.notes == ("points.json lacks 1 images of the files before it and adds 0",)


@pytest.mark.parametrize(
    ("field", "value"), [("image_id", 12), ("category_id", 5), ("bbox", [0, 0, 5, 5]), ("iscrowd", 1)]
)
def test_one_id_for_two_things_is_an_error(toy: Toy, field: str, value: Any):
    def spoil(content: dict) -> None:
        content["categories"] = CATEGORIES
        content["annotations"][0][field] = value

    with pytest.raises(DataError, match=rf"points\.json: annotation 101 has {field} .*boxes\.json.* same id"):
        read_coco([toy.boxes, _edit(toy.points, spoil)])


def test_contradicting_categories_are_an_error(toy: Toy):
    _edit(toy.boxes, lambda content: content["categories"][0].update(keypoints=["nose"]))
    with pytest.raises(DataError, match=r"points\.json: category 2 has keypoints .*'nose'"):
        read_coco([toy.boxes, toy.points])


FAULTS: dict[str, tuple[Edit, str]] = {
    "no images": (
        lambda c: c.pop("images"),
        r"no list 'images' at the top level \(found: 'annotations', 'categories', 'vocabularies'\)",
    ),
    "no annotations": (lambda c: c.pop("annotations"), "no list 'annotations'"),
    "no categories": (lambda c: c.pop("categories"), "no list 'categories'"),
    "unknown image": (
        lambda c: c["annotations"][0].update(image_id=99),
        "image 99, annotation 101: image_id 99 is not among the file's 6 images",
    ),
    "unknown category": (
        lambda c: c["annotations"][0].update(category_id=4),
        "image 11, annotation 101: unknown category_id 4; the file's categories have ids 2, 5, 9",
    ),
    "two images of one id": (lambda c: c["images"][1].update(id=11), "image id 11 occurs twice"),
    "two annotations of one id": (lambda c: c["annotations"][1].update(id=101), "annotation id 101 occurs twice"),
    "annotation without category": (
        lambda c: c["annotations"][2].pop("category_id"),
        "annotation 103 has no 'category_id'",
    ),
    "annotation without id": (lambda c: c["annotations"][2].pop("id"), "annotation number 2 has no 'id'"),
    "short box": (
        lambda c: c["annotations"][0].update(bbox=[1, 2, 3]),
        r"image 11, annotation 101: bbox is \[1, 2, 3\]; expected 4 finite numbers",
    ),
    "infinite box": (lambda c: c["annotations"][0].update(bbox=[1, 2, 3, float("inf")]), "expected 4 finite numbers"),
    "box of corners": (
        lambda c: c["annotations"][0].update(bbox=[30, 20, -10, 5]),
        r"image 11, annotation 101: bbox \[30, 20, -10, 5\] has a negative size",
    ),
    "image without size": (lambda c: c["images"][0].pop("height"), "image 11 has no 'height'"),
    "image of no size": (lambda c: c["images"][0].update(width=0), "image 11: width is 0; expected a positive"),
    "strange crowd": (lambda c: c["annotations"][0].update(iscrowd=2), "annotation 101: iscrowd is 2"),
    "textual category id": (lambda c: c["categories"][0].update(id="2"), "category id '2' is not an integer"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_named(toy: Toy, fault: str):
    edit, expected = FAULTS[fault]
    with pytest.raises(DataError, match=expected) as raised:
        read_coco([_edit(toy.boxes, edit)])
    assert str(raised.value).startswith(str(toy.boxes))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b'{"images": [],\n "annotations": [', r"line 2, column 18: not JSON .*truncated"),
        (b"[]", "a list at the top level"),
        (b"\xff\xfe{}", "not UTF-8"),
        (b"", "line 1, column 1: not JSON"),
    ],
)
def test_what_is_not_json_is_named(tmp_path: Path, content: bytes, expected: str):
    file = tmp_path / "broken.json"
    file.write_bytes(content)
    with pytest.raises(DataError, match=rf"broken\.json.*{expected}"):
        read_coco([file])


def test_missing_file_is_named(tmp_path: Path):
    with pytest.raises(DataError, match=r"none\.json: no such annotation file"):
        read_coco([tmp_path / "none.json"])


def test_real_coco_files_merge(coco_mini: Path):
    files = [coco_mini / "annotations" / f"{kind}_train2017.json" for kind in ("instances", "person_keypoints")]
    data = read_coco(files)
    annotations = [a for entries in data.annotations.values() for a in entries]
    with_points = [a for a in annotations if "keypoints" in a]
    assert (len(data.images), len(annotations), len(data.categories), len(with_points)) == (80, 739, 80, 172)
    assert {a["category_id"] for a in with_points} == {1}
    assert len(data.categories[0]["keypoints"]) == 17
    assert data.notes == ()
