"""The labels of Shape Scenes beyond boxes, masks and keypoints, against what is painted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

from mtl_rcnn.data.shape_classes import CLASSES
from mtl_rcnn.data.shape_depth import HAZE, kept_colour
from mtl_rcnn.data.shape_labels import DEPTH_SCALE, annotations_of, distance_map, image_of, vocabularies
from mtl_rcnn.data.shape_painter import FLAVOURS, Scene, sample_scene
from mtl_rcnn.data.shape_scenes import write_shape_scenes
from mtl_rcnn.data.shape_sprites import COLOURS
from mtl_rcnn.errors import DataError

SIZE = (192, 128)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(5, "train", index, SIZE, "full") for index in range(60)]


@pytest.fixture(scope="module")
def lettered() -> list[Scene]:
    return [sample_scene(5, "train", index, (256, 192), "lettered") for index in range(40)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_shape_scenes(tmp_path_factory.mktemp("full") / "s", 8, 2, 1, SIZE, progress=False, flavour="full")


# Files


def test_files_of_labels_stand_where_the_json_says_in_the_size_of_the_image(written: Path) -> None:
    content = json.loads((written / "annotations" / "instances_train.json").read_text())
    for image in content["images"]:
        for field, mode in (("sem_seg_file_name", "L"), ("depth_file_name", "I;16")):
            with Image.open(written / "train" / image[field]) as found:
                assert found.size == (image["width"], image["height"])
                assert found.mode == mode
        assert image["depth_scale"] == DEPTH_SCALE


def test_a_flavour_only_adds_to_the_scene() -> None:
    """Objects are those of the plain scene, where as many are tried for."""
    for index in range(5):
        plain, full = (sample_scene(5, "train", index, SIZE, flavour) for flavour in ("plain", "full"))
        assert np.array_equal(plain.id_map, full.id_map)
        assert [item.colour for item in plain.objects] == [item.colour for item in full.objects]
        assert plain.depth is None
        assert plain.lines is None
        assert full.depth is not None


@pytest.mark.parametrize("flavour", ["full", "lettered"])
def test_every_flavour_is_reproducible_and_longer_sets_keep_what_was_there(flavour: str, tmp_path: Path) -> None:
    options = {"val": 1, "seed": 2, "size": SIZE, "progress": False, "flavour": flavour}
    short, longer = (write_shape_scenes(tmp_path / str(count), count, **options) for count in (3, 5))
    for path in short.rglob("*.png"):
        assert path.read_bytes() == (longer / path.relative_to(short)).read_bytes(), path
    entries = [
        json.loads((root / "annotations" / "instances_train.json").read_text())["images"] for root in (short, longer)
    ]
    assert entries[0] == entries[1][:3]


def test_a_folder_of_one_flavour_is_not_taken_for_another(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'"flavour": "full".*"flavour": "plain"'):
        write_shape_scenes(written, 8, 2, 1, SIZE, progress=False)
    with pytest.raises(DataError, match="flavour 'bitter': expected one of plain, full, lettered"):
        write_shape_scenes(tmp_path / "s", flavour="bitter")


# Maps


def test_the_class_map_is_that_of_the_masks(written: Path) -> None:
    coco = COCO(str(written / "annotations" / "instances_train.json"))
    for image in coco.imgs.values():
        with Image.open(written / "train" / image["sem_seg_file_name"]) as found:
            ids = np.array(found)
        expected = np.zeros_like(ids)
        for annotation in coco.imgToAnns[image["id"]]:
            expected[coco.annToMask(annotation) > 0] = annotation["category_id"]
        assert np.array_equal(ids, expected)
    known = {entry["id"] for entry in coco.dataset["vocabularies"]["sem_seg_classes"]}
    assert known == {0, *(kind.category_id for kind in CLASSES)}


def test_nearer_objects_cover_farther_ones_and_the_floor_is_behind_all(scenes: list[Scene]) -> None:
    for scene in scenes:
        distances = [item.distance for item in scene.objects]
        assert distances == sorted(distances, reverse=True)
        known = scene.depth > 0
        assert not known[:2].any()
        assert not known[:, -2:].any()
        assert known[2:-2, 2:-2].all()
        for item in scene.objects:
            own = scene.depth[(scene.id_map == item.order + 1) & known]
            assert np.allclose(own, item.distance)
        floor = np.where(scene.id_map == 0, scene.depth, np.inf)[2:-2, 2:-2]
        assert floor.min() > max(distances)


def test_the_floor_is_a_plane_in_perspective(scenes: list[Scene]) -> None:
    for scene in scenes[:10]:
        background = (scene.id_map == 0) & (scene.depth > 0)
        rows = [row for row in range(len(background)) if background[row].any()]
        inverse = np.array([1 / scene.depth[row][background[row]][0] for row in rows])
        line = np.polyval(np.polyfit(rows, inverse, 1), rows)
        assert np.allclose(inverse, line, atol=1e-5)


def test_distances_survive_the_file_to_half_a_millimetre(scenes: list[Scene]) -> None:
    for scene in scenes[:10]:
        stored = distance_map(scene).astype(np.float64) / DEPTH_SCALE
        assert np.abs(stored - scene.depth).max() <= 0.5 / DEPTH_SCALE + 1e-6


def test_haze_moves_colours_towards_its_own_with_the_distance(scenes: list[Scene]) -> None:
    """Regression over many plain objects: what is left of the contrast to the haze is exp(-d / 10 m)."""
    left = []
    for index, scene in enumerate(scenes):
        clear = sample_scene(5, "train", index, SIZE).image.astype(float)
        for item in scene.objects:
            inside = cv2.erode((scene.id_map == item.order + 1).astype(np.uint8), np.ones((7, 7))) > 0
            if item.fill == "solid" and not item.kind.keypoints and inside.sum() > 60:
                contrast = [np.abs(image[inside].mean(0) - HAZE).max() for image in (clear, scene.image.astype(float))]
                left.append((kept_colour(np.array(item.distance)), contrast[1] / contrast[0]))
    expected, found = np.array(left).T
    assert len(left) > 20
    assert np.corrcoef(expected, found)[0, 1] > 0.8


# Words


def test_attributes_say_what_is_painted(scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.id_map.shape
        for item, annotation in zip(scene.objects, annotations_of(scene, 1, 1), strict=True):
            said = annotation["attributes"]
            x, y, w, h = annotation["bbox"]
            assert said["colour"] == item.colour
            assert said["fill"] == item.fill
            assert said["size"] == pytest.approx(item.size / min(height, width), abs=1e-4)
            assert ("cut" in said["traits"]) == (x == 0 or y == 0 or x + w == width or y + h == height)
            assert ("patterned" in said["traits"]) == (item.fill != "solid")
            assert ("occluded" in said["traits"]) == (item.visible_fraction < 0.95)


def test_attributes_keep_to_their_vocabulary(scenes: list[Scene]) -> None:
    groups = {entry["name"]: entry for entry in vocabularies("full")["attributes"]}
    seen = set()
    for scene in scenes:
        for item, annotation in zip(scene.objects, annotations_of(scene, 1, 1), strict=True):
            for name, value in annotation["attributes"].items():
                group = groups[name]
                assert item.kind.name in group.get("classes", [item.kind.name])
                values = value if isinstance(value, list) else [value]
                assert group["type"] == "scalar" or set(values) <= set(group["values"])
                seen.add(name)
    assert seen == set(groups)


def test_the_painted_colour_can_be_read_off_the_picture() -> None:
    """Of single-coloured objects in clear air, by the nearest palette colour of the median pixel's hue."""
    hits = []
    for index in range(60):
        scene = sample_scene(5, "train", index, SIZE)
        for item in scene.objects:
            inside = cv2.erode((scene.id_map == item.order + 1).astype(np.uint8), np.ones((5, 5))) > 0
            if item.fill != "solid" or item.kind.keypoints or inside.sum() < 40:
                continue
            mean = scene.image[inside].mean(0)
            unit = {name: np.array(c) / np.linalg.norm(c) for name, c in COLOURS.items()}
            nearest = max(unit, key=lambda name: unit[name] @ mean)
            hits.append(nearest == item.colour)
    assert len(hits) > 30
    assert np.mean(hits) > 0.85


def test_a_pattern_can_be_read_off_the_picture() -> None:
    """The accent tone of stripes and dots spreads the pixels of an object; noise spreads those of a plain one less."""
    spread = {True: [], False: []}
    for index in range(60):
        scene = sample_scene(5, "train", index, SIZE)
        for item, annotation in zip(scene.objects, annotations_of(scene, 1, 1), strict=True):
            inside = cv2.erode((scene.id_map == item.order + 1).astype(np.uint8), np.ones((3, 3))) > 0
            if not item.kind.keypoints and inside.sum() >= 100:
                patterned = "patterned" in annotation["attributes"]["traits"]
                assert patterned == (annotation["attributes"]["fill"] in ("striped", "dotted"))
                spread[patterned].append(scene.image[inside].std(0).max())
    assert len(spread[True]) > len(spread[False]) > 20
    assert np.mean([value < 20 for value in spread[False]]) > 0.9
    assert np.mean([value > 20 for value in spread[True]]) > 0.9


def test_a_figure_that_faces_the_viewer_has_its_left_on_the_right(scenes: list[Scene]) -> None:
    seen = set()
    for scene in scenes:
        for annotation in annotations_of(scene, 1, 1):
            if "facing" not in annotation["attributes"]:
                continue
            points = np.reshape(annotation["keypoints"], (-1, 3))
            names = next(kind.keypoints for kind in CLASSES if kind.category_id == annotation["category_id"])
            left, right = (points[names.index(f"{side}_shoulder")] for side in ("left", "right"))
            if left[2] and right[2] and left[0] != right[0]:
                assert annotation["attributes"]["facing"] == ("front" if left[0] > right[0] else "back")
                seen.add(annotation["attributes"]["facing"])
    assert seen == {"front", "back"}


def test_image_labels_name_what_is_there(scenes: list[Scene]) -> None:
    words = {entry["name"] for entry in vocabularies("full")["image_labels"]}
    for scene in scenes:
        labels = set(image_of(scene, 1, "train")["image_labels"])
        expected = {item.kind.name for item in scene.objects} | {item.colour for item in scene.objects}
        expected |= {"crowded"} if len(scene.objects) >= 5 else set()
        expected |= {"lettered"} if scene.lines else set()
        assert labels == expected <= words


# Lines of text


def test_text_stands_on_the_background_alone_and_its_quadrilateral_is_tight(lettered: list[Scene]) -> None:
    lines = [(scene, line) for scene in lettered for line in scene.lines]
    assert len(lines) > 60
    for scene, line in lines:
        assert (scene.id_map[line.window] == 0).all()
        rows, columns = np.nonzero(line.letters)
        y0, x0 = line.window[0].start, line.window[1].start
        letters = np.stack([columns / 2 + 0.25 + x0, rows / 2 + 0.25 + y0], axis=1).astype(np.float32)
        quad = line.polygon.astype(np.float32)
        distance = [cv2.pointPolygonTest(quad, tuple(map(float, point)), True) for point in letters[::7]]
        assert min(distance) > -1.0  # no letter leaves it,
        for a, b in zip(quad, np.roll(quad, -1, axis=0), strict=True):  # and one is near each side
            normal = np.array([b[1] - a[1], a[0] - b[0]]) / np.linalg.norm(b - a)
            assert np.abs((letters - a) @ normal).min() < 2


def test_text_changes_the_picture_inside_its_quadrilaterals_alone(
    lettered: list[Scene], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the same scenes painted without text; edges are soft, and corners rounded to pixels here."""
    monkeypatch.setitem(FLAVOURS, "lettered", replace(FLAVOURS["lettered"], lines=(1.0,)))
    for index, scene in enumerate(lettered):
        bare = sample_scene(5, "train", index, (256, 192), "lettered")
        assert bare.lines is None
        inside = np.zeros(scene.id_map.shape, np.uint8)
        for line in scene.lines:
            cv2.fillConvexPoly(inside, np.rint(line.polygon - 0.5).astype(np.int32), 1)
        changed = (scene.image != bare.image).any(2)
        assert not (changed & (cv2.dilate(inside, np.ones((5, 5))) == 0)).any()
        assert changed.any() == bool(scene.lines)
        assert np.array_equal(scene.id_map, bare.id_map)


def test_corners_go_clockwise_from_the_top_left_as_it_is_read(lettered: list[Scene]) -> None:
    for scene in lettered:
        for line in scene.lines:
            top_left, top_right, bottom_right, bottom_left = line.polygon
            right, down = top_right - top_left, bottom_left - top_left
            assert right[0] * down[1] - right[1] * down[0] > 0
            assert np.allclose(top_left + right + down, bottom_right)
            assert right[0] > abs(right[1])


def test_letters_differ_from_what_is_behind_them(lettered: list[Scene]) -> None:
    for scene in lettered:
        for line in scene.lines:
            window = scene.image[line.window].astype(float).mean(2)
            ink = line.letters[::2, ::2]
            assert abs(window[ink].mean() - window[~ink].mean()) > 25


def test_lines_are_level_or_oriented_and_some_scenes_have_none(lettered: list[Scene]) -> None:
    slopes = [
        abs(np.degrees(np.arctan2(*(line.polygon[1] - line.polygon[0])[::-1])))
        for scene in lettered
        for line in scene.lines
    ]
    assert max(slopes) > 8
    assert np.mean(np.array(slopes) < 1) > 0.5
    assert len(FLAVOURS["full"].lines) == 4
    assert any(not sample_scene(5, "train", index, SIZE, "full").lines for index in range(20))
