"""Label spaces: merged by name, stable, plain JSON."""

from __future__ import annotations

import json

import pytest
from toy import CATEGORIES

from mtl_rcnn.data.label_space import LabelSpace, merge_categories
from mtl_rcnn.errors import DataError


def test_classes_follow_category_ids_then_datasets():
    one = [{"id": 7, "name": "b"}, {"id": 2, "name": "a"}]
    two = [{"id": 1, "name": "c"}, {"id": 2, "name": "b"}]
    assert merge_categories({"one": one, "two": two}, {}).classes == ("a", "b", "c")
    assert merge_categories({"two": two, "one": one}, {}).classes == ("c", "b", "a")


def test_aliases_join_classes():
    space = merge_categories(
        {"one": [{"id": 1, "name": "bicycle"}], "two": [{"id": 1, "name": "bike"}]}, {"bike": "bicycle"}
    )
    assert space.classes == ("bicycle",)
    assert space.index() == {"bicycle": 0}


def test_fields_are_united_and_ids_forgotten():
    plain = [{"id": 4, "name": "figure"}]
    space = merge_categories({"plain": plain, "rich": CATEGORIES}, {})
    assert space.categories[0] == {key: value for key, value in CATEGORIES[0].items() if key != "id"}


def test_contradiction_names_both_datasets_class_and_field():
    other = [{"id": 1, "name": "figure", "keypoints": ["nose"]}]
    with pytest.raises(DataError, match=r"'figure'.*'first' and 'second'.*'keypoints'.*data\.aliases"):
        merge_categories({"first": CATEGORIES, "second": other}, {})


def test_bookkeeping_may_differ():
    other = [{"id": 1, "name": "figure", "supercategory": "none"}]
    assert merge_categories({"first": CATEGORIES, "second": other}, {}).categories[0]["supercategory"] == "toy"


def test_state_survives_json():
    space = merge_categories({"toy": CATEGORIES}, {})
    assert LabelSpace.from_state(json.loads(json.dumps(space.state()))) == space


def test_state_is_a_copy():
    space = merge_categories({"toy": CATEGORIES}, {})
    space.state()["categories"][0]["keypoints"].append("tail")
    assert space.categories[0]["keypoints"] == ["head", "left_hand", "right_hand"]


def test_equal_names_are_refused():
    with pytest.raises(DataError, match="occur twice: a"):
        LabelSpace(({"name": "a"}, {"name": "a"}))
