"""Shape Scenes: reproducible, exact to the pixel, valid COCO, and never half written."""

from __future__ import annotations

import contextlib
import io
import json
import subprocess
import sys
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as coco_mask
from pycocotools.coco import COCO

from mtl_rcnn.data import shape_scenes
from mtl_rcnn.data.coco_segmentation import mask_to_segmentation
from mtl_rcnn.data.shape_classes import CLASSES, LIGHT
from mtl_rcnn.data.shape_labels import SHAPE_CATEGORIES, annotations_of
from mtl_rcnn.data.shape_painter import SPLITS, Scene, sample_scene
from mtl_rcnn.data.shape_scenes import main, parse_size, write_shape_scenes
from mtl_rcnn.errors import DataError

SIZE = (192, 128)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(7, "train", index, SIZE) for index in range(200)]


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("data") / "shapes"
    return write_shape_scenes(out, train=24, val=12, seed=3, size=SIZE, progress=False)


def load(root: Path, split: str) -> COCO:
    with contextlib.redirect_stdout(io.StringIO()):
        return COCO(str(root / "annotations" / f"instances_{split}.json"))


def rasterise(segmentation: list | dict, height: int, width: int) -> np.ndarray:
    runs = coco_mask.frPyObjects(segmentation, height, width)
    return coco_mask.decode(coco_mask.merge(runs) if isinstance(runs, list) else runs).astype(bool)


def files(root: Path) -> dict[str, bytes]:
    return {str(path.relative_to(root)): path.read_bytes() for path in root.rglob("*") if path.is_file()}


# Reproducible


def test_scene_depends_on_its_number_only(scenes: list[Scene]) -> None:
    for index in (150, 3, 77):
        again = sample_scene(7, "train", index, SIZE)
        assert np.array_equal(again.image, scenes[index].image)
        assert np.array_equal(again.id_map, scenes[index].id_map)


def test_splits_seeds_and_numbers_differ() -> None:
    keys = [(seed, split, index) for seed in (0, 1) for split in SPLITS for index in range(10)]
    assert len({sample_scene(*key, SIZE).image.tobytes() for key in keys}) == len(keys)


def test_same_parameters_write_the_same_bytes(written: Path, tmp_path: Path) -> None:
    again = write_shape_scenes(tmp_path / "again", train=24, val=12, seed=3, size=SIZE, progress=False)
    assert files(again) == files(written)


def test_more_scenes_keep_the_earlier_ones(written: Path, tmp_path: Path) -> None:
    longer = write_shape_scenes(tmp_path / "longer", train=30, val=12, seed=3, size=SIZE, progress=False)
    pictures = {name: data for name, data in files(written).items() if name.endswith(".png")}
    assert len(pictures) == 72  # each with a map of its classes
    assert pictures.items() <= files(longer).items()


# What the scenes are like


def test_enough_objects_and_enough_occlusion(scenes: list[Scene]) -> None:
    objects = [item for scene in scenes for item in scene.objects]
    assert len(objects) / len(scenes) >= 4
    assert np.mean([item.visible_fraction < 1 for item in objects]) >= 0.3
    assert {item.kind.name for item in objects} == {kind.name for kind in CLASSES}
    assert {int(v) for item in objects for v in item.keypoints[:, 2]} == {0, 1, 2}


def test_scenes_are_never_square_and_their_sizes_differ(scenes: list[Scene]) -> None:
    shapes = {scene.image.shape[:2] for scene in scenes}
    assert all(height != width for height, width in shapes)
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)
    assert len(shapes) > 10


def test_every_object_stands_out_in_the_id_map(scenes: list[Scene]) -> None:
    for scene in scenes:
        assert [item.order for item in scene.objects] == list(range(len(scene.objects)))
        assert set(np.unique(scene.id_map)) - {0} == {item.order + 1 for item in scene.objects}


@pytest.mark.parametrize("axis", [0, 1])
def test_picture_and_masks_are_aligned(scenes: list[Scene], axis: int) -> None:
    """Where an object begins in the mask the picture changes most; half a pixel off would already blur this."""
    change = {-1: [], 0: [], 1: []}
    for scene in scenes:
        grey = np.moveaxis(scene.image.mean(2), axis, 0)
        covered = np.moveaxis(scene.id_map > 0, axis, 0).astype(int)
        step = np.abs(np.diff(grey, axis=0))
        y, x = np.nonzero(np.diff(covered, axis=0)[1:-1] == 1)
        for shift, values in change.items():
            values.append(step[1 + y + shift, x].mean())
    before, at, after = (np.mean(values) for values in change.values())
    assert at > 1.5 * max(before, after)


def test_keypoint_visibility_agrees_with_the_id_map(scenes: list[Scene]) -> None:
    for scene in scenes:
        height, width = scene.id_map.shape
        for item in scene.objects:
            assert len(item.keypoints) == len(item.kind.keypoints)
            for x, y, v in item.keypoints:
                if v == 0:
                    assert x == y == 0
                    continue
                assert 0 <= x < width
                assert 0 <= y < height
                top = scene.id_map[y, x] - 1
                assert top == item.order if v == 2 else top > item.order  # covered means: by a nearer object


def test_left_and_right_follow_the_side_that_a_figure_shows() -> None:
    """A bib (front view) means that the figure's left is on the image's right, a pack the reverse, in any pose."""
    figure = next(kind for kind in CLASSES if kind.name == "figure")
    left, right = (figure.keypoints.index(f"{side}_shoulder") for side in ("left", "right"))
    fronts = []
    for seed in range(40):
        outline = figure.draw(np.random.default_rng(seed))
        fronts.append(any(part.tone == LIGHT for part in outline.parts))
        assert (outline.keypoints[left, 0] > outline.keypoints[right, 0]) == fronts[-1]
    assert 0 < sum(fronts) < len(fronts)


# Exact COCO annotations


def test_segmentation_box_and_area_are_the_visible_pixels(scenes: list[Scene]) -> None:
    kinds = set()
    for scene in scenes[:100]:
        height, width = scene.id_map.shape
        for item, annotation in zip(scene.objects, annotations_of(scene, 1, 1), strict=True):
            mask = scene.id_map == item.order + 1
            segmentation = annotation["segmentation"]
            assert np.array_equal(rasterise(segmentation, height, width), mask)
            runs = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
            assert annotation["area"] == coco_mask.area(runs)
            assert annotation["bbox"] == coco_mask.toBbox(runs).tolist()
            kinds.add("runs" if isinstance(segmentation, dict) else "polygons" if len(segmentation) > 1 else "polygon")
    assert kinds == {"runs", "polygons", "polygon"}


def test_any_mask_survives_as_segmentation() -> None:
    rng = np.random.default_rng(0)
    forms = []
    for _ in range(500):
        mask = rng.random((8, 11)) < rng.uniform(0.1, 0.9)
        mask[rng.integers(8), rng.integers(11)] = True
        segmentation = mask_to_segmentation(mask)
        forms.append(type(segmentation))
        assert np.array_equal(rasterise(segmentation, *mask.shape), mask)
    assert min(forms.count(list), forms.count(dict)) > 50


def test_diagonal_pixels_are_two_polygons_and_a_frame_is_run_lengths() -> None:
    for diagonal in (np.eye(2, dtype=bool), np.eye(2, dtype=bool)[::-1].copy()):
        assert [len(polygon) for polygon in mask_to_segmentation(diagonal)] == [8, 8]
    frame = np.ones((3, 3), bool)
    frame[1, 1] = False
    assert mask_to_segmentation(frame) == {"size": [3, 3], "counts": [0, 4, 1, 4]}


@pytest.mark.parametrize("split", SPLITS)
def test_written_files_are_valid_coco(written: Path, split: str) -> None:
    coco = load(written, split)
    assert len(coco.imgs) == {"train": 24, "val": 12}[split]
    assert sorted(coco.anns) == list(range(1, len(coco.dataset["annotations"]) + 1))
    for image in coco.imgs.values():
        picture = cv2.imread(str(written / split / image["file_name"]))
        assert picture.shape == (image["height"], image["width"], 3)
    for annotation in coco.anns.values():
        image, category = coco.imgs[annotation["image_id"]], coco.cats[annotation["category_id"]]
        mask = coco.annToMask(annotation)
        assert mask.shape == (image["height"], image["width"])
        assert mask.sum() == annotation["area"] > 0
        assert ("keypoints" in annotation) == ("keypoints" in category)
        if "keypoints" in annotation:
            points = np.reshape(annotation["keypoints"], (-1, 3))
            assert len(points) == len(category["keypoints"])
            assert annotation["num_keypoints"] == (points[:, 2] > 0).sum()


def test_written_pictures_are_the_scenes_in_rgb(written: Path) -> None:
    picture = cv2.cvtColor(cv2.imread(str(written / "val" / "000000000005.png")), cv2.COLOR_BGR2RGB)
    assert np.array_equal(picture, sample_scene(3, "val", 4, SIZE).image)


def test_categories_have_valid_schemas() -> None:
    assert len({category["id"] for category in SHAPE_CATEGORIES}) == len(SHAPE_CATEGORIES)
    schemas = [category for category in SHAPE_CATEGORIES if "keypoints" in category]
    assert [len(category["keypoints"]) for category in schemas] == [13, 4]
    for category in schemas:
        names = category["keypoints"]
        assert len(set(names)) == len(names)
        assert {name.replace("left_", "right_") for name in names} <= set(names)
        ends = np.array(category["skeleton"])
        assert set(ends.ravel()) == set(range(1, len(names) + 1))
        assert (ends[:, 0] != ends[:, 1]).all()


# Written once, whole, or not at all


def test_second_call_writes_nothing(written: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in written.rglob("*")}
    write_shape_scenes(written, train=24, val=12, seed=3, size=SIZE, progress=False)
    assert {path: path.stat().st_mtime_ns for path in written.rglob("*")} == before


def test_other_parameters_for_the_same_folder_are_an_error(written: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r'"seed": 3.*"seed": 4.*another folder, or delete'):
        write_shape_scenes(written, train=24, val=12, seed=4, size=SIZE)
    (tmp_path / "precious.txt").write_text("not ours")
    with pytest.raises(DataError, match="holds no Shape Scenes"):
        write_shape_scenes(tmp_path)
    assert (tmp_path / "precious.txt").exists()


def test_a_failure_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail_at_three(seed: int, split: str, index: int, *options: object) -> Scene:
        if index == 3:
            raise OSError("disk full")
        return sample_scene(seed, split, index, *options)

    monkeypatch.setattr(shape_scenes, "sample_scene", fail_at_three)
    with pytest.raises(OSError, match="disk full"):
        write_shape_scenes(tmp_path / "shapes", train=8, val=2, progress=False)
    assert list(tmp_path.iterdir()) == []


def test_processes_may_race(tmp_path: Path) -> None:
    command = [sys.executable, str(ROOT / "datasets" / "shape_scenes.py"), "--out", str(tmp_path / "shapes")]
    options = ["--train", "20", "--val", "4"]
    racers = [subprocess.Popen([*command, *options], stderr=subprocess.PIPE, text=True) for _ in range(3)]
    assert [(racer.communicate()[1], racer.returncode)[1] for racer in racers] == [0, 0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]
    assert len(load(tmp_path / "shapes", "train").imgs) == 20


def test_losing_the_race_to_another_data_set_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def overtaken(root: Path, split: str, count: int, *_: object) -> None:
        write_shape_scenes(tmp_path / "shapes", train=1, val=1, progress=False)

    original = shape_scenes._write_split
    with monkeypatch.context() as patch:
        patch.setattr(shape_scenes, "_write_split", lambda *args: (patch.undo(), overtaken(*args)))
        with pytest.raises(DataError, match="another folder, or delete"):
            write_shape_scenes(tmp_path / "shapes", train=2, val=1, progress=False)
    assert shape_scenes._write_split is original
    assert [path.name for path in tmp_path.iterdir()] == ["shapes"]


# The command line


def test_command_line_writes_and_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--out", str(tmp_path / "s"), "--train", "2", "--val", "1", "--size", "160x96"]) == 0
    captured = capsys.readouterr()
    assert "2 training and 1 validation scenes" in captured.out
    assert "train 2/2" in captured.err
    assert json.loads((tmp_path / "s" / "shape_scenes.json").read_text())["size"] == [160, 96]


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--size", "192"], "size '192': expected WIDTHxHEIGHT"),
        (["--size", "-3x128"], "size '-3x128': expected WIDTHxHEIGHT"),
        (["--size", "32x20"], "size 32x20: expected sides of at least 64 pixels"),
        (["--size", "128x128"], "size 128x128: expected sides that differ by at least 10 %"),
        (["--train", "-1"], "train=-1: expected a number of at least 0"),
        (["--seed", "-5"], "seed=-5: expected a number of at least 0"),
    ],
)
def test_wrong_parameters_are_one_clear_line(
    options: list[str], says: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--out", str(tmp_path / "s"), *(f"{key}={value}" for key, value in zip(*[iter(options)] * 2))]
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert says in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "s").exists()


def test_parse_size_is_width_first() -> None:
    assert parse_size("192x128") == (192, 128)
    assert parse_size("640X480") == (640, 480)
