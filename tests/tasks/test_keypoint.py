"""What is particular to keypoints: schemas, mirrors, arrays that do not fit, similarities of one's own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T

from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.tasks.keypoint import COCO_PERSON_NAMES, KeypointEvaluator, KeypointTarget, read_schemas

ARROW = {"name": "arrow", "keypoints": ["tip", "tail"], "skeleton": [[1, 2]]}
HAND = {"name": "hand", "keypoints": ["wrist", "left_thumb", "right_thumb"]}
SPACE = LabelSpace((ARROW, {"name": "disc"}, HAND, {"name": "glove"}))


def target(**knobs: Any) -> KeypointTarget:
    return KeypointTarget("keypoint", SPACE, knobs.get("shared", {}), knobs.get("flip_pairs", {}))


def record(*annotations: dict[str, Any], tasks: tuple[str, ...] | None = None) -> dict[str, Any]:
    numbered = [{"id": 40 + i, "iscrowd": 0, **annotation} for i, annotation in enumerate(annotations)]
    return {"dataset": "toy", "image_id": 7, "height": 60, "width": 100, "tasks": tasks, "annotations": numbered}


def test_schemas_follow_one_another_and_classes_without_points_have_none() -> None:
    arrow, hand = read_schemas(SPACE, {}, {})
    assert (arrow.channels, arrow.classes, arrow.mirror) == (slice(0, 2), (0,), (0, 1))
    assert (hand.channels, hand.classes, hand.mirror) == (slice(2, 5), (2,), (0, 2, 1))
    assert arrow.edges == ((0, 1),)


def test_a_schema_is_shared_only_when_said() -> None:
    _, hand = read_schemas(SPACE, {"glove": "hand"}, {})
    assert hand.classes == (2, 3)
    with pytest.raises(ConfigError, match="class 'disc' cannot share the keypoint schema of 'glove'"):
        read_schemas(SPACE, {"disc": "glove"}, {})
    with pytest.raises(ConfigError, match="class 'foot': no such class"):
        read_schemas(SPACE, {"foot": "hand"}, {})


def test_points_land_in_their_classes_channels_at_pixel_centres() -> None:
    points = [[10, 20, 2, 30, 40, 1], [5, 6, 2, 0, 0, 0, 8, 9, 2]]
    objects = [
        {"category_id": 0, "keypoints": points[0]},
        {"category_id": 1},
        {"category_id": 2, "keypoints": points[1]},
    ]
    label = target().load(record(*objects), objects, Geometry.identity(60, 100))
    found = label["gt_keypoints"].tensor
    assert label["gt_has_keypoint"].tolist() == [True, False, True]
    assert found[0, :2].tolist() == [[10.5, 20.5, 2], [30.5, 40.5, 1]]
    assert found[2, 2:].tolist() == [[5.5, 6.5, 2], [0, 0, 0], [8.5, 9.5, 2]]
    assert not found[1].any()
    assert not found[0, 2:].any()


@pytest.mark.parametrize("flip", [T.HFlipTransform(100), T.VFlipTransform(60)])
def test_any_mirror_swaps_left_and_right_and_twice_is_the_identity(flip: T.Transform) -> None:
    objects = [{"category_id": 2, "keypoints": [50, 30, 2, 20, 10, 2, 80, 15, 1]}]
    once = Geometry(T.TransformList([flip]), 60, 100)
    twice = Geometry(T.TransformList([flip, flip]), 60, 100)
    plain, mirrored, back = (
        target().load(record(*objects), objects, geometry)["gt_keypoints"].tensor[0, 2:]
        for geometry in (Geometry.identity(60, 100), once, twice)
    )
    assert torch.equal(back, plain)
    moved = once.points(plain[:, :2].numpy())
    np.testing.assert_allclose(mirrored[:, :2].numpy(), moved[[0, 2, 1]])
    assert mirrored[:, 2].tolist() == [2, 1, 2]


def test_points_outside_the_image_are_not_annotated() -> None:
    objects = [{"category_id": 0, "keypoints": [10, 20, 2, 90, 40, 2]}]
    crop = Geometry(T.TransformList([T.CropTransform(0, 0, 50, 60)]), 60, 50)
    found = target().load(record(*objects), objects, crop)["gt_keypoints"].tensor[0, :2]
    assert found.tolist() == [[10.5, 20.5, 2], [0, 0, 0]]


def test_all_invisible_counts_as_absent() -> None:
    objects = [{"category_id": 0, "keypoints": [0] * 6, "num_keypoints": 0}]
    assert target().check(record(*objects, tasks=("keypoint",))).instances == 0
    label = target().load(record(*objects), objects, Geometry.identity(60, 100))
    assert label["gt_has_keypoint"].tolist() == [False]


def test_an_array_of_the_wrong_length_names_the_annotation_and_what_was_expected() -> None:
    faulty = record({"category_id": 0, "keypoints": [1, 2, 2, 4, 5, 2]}, {"category_id": 2, "keypoints": [1, 2, 2]})
    with pytest.raises(DataError, match=r"'toy', image 7, annotation 41 has 3 keypoint numbers: class 'hand' .* so 9"):
        target().check(faulty)


def test_a_declared_array_that_is_missing_is_an_error_and_an_undeclared_one_is_absent() -> None:
    with pytest.raises(
        DataError, match="annotation 40 has no 'keypoints', but the dataset declares the task 'keypoint'"
    ):
        target().check(record({"category_id": 0}, tasks=("keypoint",)))
    assert target().check(record({"category_id": 0})).instances == 0
    assert target().check(record({"category_id": 1}, tasks=("keypoint",))).image


def test_similarities_are_given_cocos_or_uniform_with_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    person = LabelSpace(({"name": "person", "keypoints": list(COCO_PERSON_NAMES)},))
    assert KeypointEvaluator("keypoint", person, [], {}, {}, {}).sigmas[0][:2] == (0.026, 0.025)
    assert not caplog.records
    evaluator = KeypointEvaluator("keypoint", SPACE, [], {}, {}, {"arrow": [0.1, 0.2]})
    assert evaluator.sigmas == [(0.1, 0.2), (0.05, 0.05, 0.05)]
    assert "class 'hand': no keypoint sigmas given" in caplog.text
    assert KeypointEvaluator("keypoint", SPACE, [], {}, {}, {"arrow": 0.1, "hand": 0.2}).sigmas[1] == (0.2, 0.2, 0.2)
    with pytest.raises(ConfigError, match=r"tasks.keypoint.evaluator.sigmas: the network has no class 'arow'; did you"):
        KeypointEvaluator("keypoint", SPACE, [], {}, {}, {"arow": [0.1, 0.2]})
    with pytest.raises(ConfigError, match=r"tasks.keypoint.evaluator.sigmas.arrow has 3 values: .* 2 keypoints"):
        KeypointEvaluator("keypoint", SPACE, [], {}, {}, {"arrow": [0.1, 0.2, 0.3]})


def test_no_class_with_keypoints_is_said() -> None:
    with pytest.raises(ConfigError, match="no class declares keypoints"):
        read_schemas(LabelSpace(({"name": "disc"},)), {}, {})
