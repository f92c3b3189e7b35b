"""The predictor gives what the network gives, whatever form the images come in, and survives broken ones."""

from __future__ import annotations

import itertools
import subprocess
import sys
import weakref
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from networks import images, restored, write_checkpoint, write_images
from PIL import Image
from tiny import available_tasks, region_tasks

from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.transforms import build_augmentations
from mtl_rcnn.data.views import Views
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.errors import CheckpointError, ConfigError, DataError, UnreadableImageError
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.views import MultiViewNetwork
from mtl_rcnn.predict import Predictor, Result

DETECTION = ["detection"]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network with all tasks."""
    return write_checkpoint(tmp_path_factory.mktemp("run") / "model_0000001.pth", available_tasks())


@pytest.fixture(scope="module")
def boxes_only(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("run") / "network.pth", DETECTION)


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    return write_images(tmp_path / "images")


def expected(path: Path, group: list[np.ndarray]) -> list[dict[str, torch.Tensor]]:
    """One padded batch, prepared by the mapper of evaluation, through the network itself."""
    network = restore(path)
    augment = build_augmentations(network.cfg.data.test_augment)
    mapper = Mapper({}, augment, network.cfg.model.input_format, training=False)
    folder = path.parent / "expected"
    folder.mkdir(exist_ok=True)
    samples = []
    for index, image in enumerate(group):
        file = folder / f"{index}.png"
        Image.fromarray(image).save(file)
        record = {"file_name": str(file), "height": image.shape[0], "width": image.shape[1], "image_id": index}
        samples.append(mapper({**record, "dataset": "test", "annotations": []}, index))
    return network.model.predict(samples)


def assert_equal(result: Result, prediction: dict[str, torch.Tensor]) -> None:
    assert set(result.outputs) == set(prediction)
    for name, value in prediction.items():
        assert torch.equal(result[name], value), name


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_results_are_those_of_the_same_batches_through_the_network(
    checkpoint: Path, files: list[Path], batch_size: int
) -> None:
    results = list(Predictor(checkpoint, batch_size=batch_size)(files[0].parent))
    assert [result.name for result in results] == ["0.png", "1.png", "2.png", "3.png", "4.png"]
    assert sum(len(result) for result in results) > 20
    given = images()
    for start in range(0, len(given), batch_size):
        wanted = expected(checkpoint, given[start : start + batch_size])
        for result, prediction in zip(results[start:], wanted):
            assert_equal(result, prediction)


def test_every_form_of_an_image_gives_the_same(boxes_only: Path, files: list[Path]) -> None:
    image = images()[0]
    (wanted,) = expected(boxes_only, [image])
    predictor = Predictor(boxes_only)
    for form in (image, files[0], str(files[0]), Image.open(files[0]), Image.fromarray(image)):
        assert_equal(predictor.one(form), wanted)
        assert_equal(next(predictor([form])), wanted)
    bgr = Predictor(boxes_only, channel_order="BGR")
    assert_equal(bgr.one(cv2.imread(str(files[0]))), wanted)
    assert_equal(bgr.one(files[0]), wanted)
    assert len(wanted["boxes"]) > 0


def test_a_result_is_in_the_pixels_of_its_image(boxes_only: Path, files: list[Path]) -> None:
    for result, image in zip(Predictor(boxes_only)(files[0].parent), images(), strict=True):
        height, width = image.shape[:2]
        assert (result.image == image).all()
        assert (result.boxes >= 0).all()
        assert (result.boxes <= torch.tensor([width, height, width, height])).all()
        assert result.class_names == [("figure", "disc")[index] for index in result["classes"]]
        assert len(result.scores) == len(result) == len(result.boxes)
        assert (result.path, result.frame) == (files[0].parent / result.name, None)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_orientation_is_respected(boxes_only: Path, tmp_path: Path, orientation: int) -> None:
    image = Image.fromarray(images()[0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    image.save(tmp_path / "turned.png", exif=exif)
    seen = np.array(image)
    if orientation >= 5:
        seen = seen.transpose(1, 0, 2)
    rows, columns = {2: (1, -1), 3: (-1, -1), 4: (-1, 1), 6: (1, -1), 7: (-1, -1), 8: (-1, 1)}.get(orientation, (1, 1))
    upright = np.ascontiguousarray(seen[::rows, ::columns])
    predictor = Predictor(boxes_only)
    for form in (tmp_path / "turned.png", Image.open(tmp_path / "turned.png")):
        result = predictor.one(form)
        assert (result.image == upright).all()
        assert_equal(result, predictor.one(upright).outputs)


def test_streams_of_all_kinds(boxes_only: Path, files: list[Path]) -> None:
    folder = files[0].parent
    (folder / "notes.txt").write_text("no image")
    (folder / "sub").mkdir()
    Image.fromarray(images()[1]).save(folder / "sub" / "5.jpeg")
    predictor = Predictor(boxes_only, batch_size=2)

    def names(source: object) -> list[str]:
        return [result.name for result in predictor(source)]

    assert names(str(folder / "**" / "*.*g")) == ["0.png", "1.png", "2.png", "3.png", "4.png", "sub/5.jpeg"]
    assert names(files[:2]) == [str(files[0]), str(files[1])]
    assert names([files[1], images()[0], folder / "sub"]) == [str(files[1]), "image 1", "5.jpeg"]
    assert names(path for path in files[3:]) == [str(files[3]), str(files[4])]
    assert [result.name for result in predictor(folder, limit=3)] == ["0.png", "1.png", "2.png"]


def test_threads_change_nothing(boxes_only: Path, files: list[Path]) -> None:
    plain, threaded = (list(Predictor(boxes_only, workers=n, batch_size=2)(files[0].parent)) for n in (0, 3))
    assert [result.name for result in plain] == [result.name for result in threaded]
    for one, other in zip(plain, threaded, strict=True):
        assert_equal(one, other.outputs)


@pytest.mark.parametrize("workers", [0, 2])
def test_an_endless_stream_needs_little_memory(boxes_only: Path, workers: int) -> None:
    alive: weakref.WeakSet[Result] = weakref.WeakSet()
    begun = 0

    def endless():
        nonlocal begun
        for begun in itertools.count(1):
            yield np.full((32, 40, 3), begun % 256, dtype=np.uint8)

    predictor = Predictor(boxes_only, tasks=DETECTION, batch_size=2, workers=workers)
    for number, result in enumerate(predictor(endless()), start=1):
        alive.add(result)
        assert result.image[0, 0, 0] == number % 256
        assert begun - number <= 3 * (2 + workers) + 2
        assert len(alive) <= 4
        if number == 60:
            break


def test_unused_heads_are_not_computed(checkpoint: Path, files: list[Path]) -> None:
    if available_tasks() == DETECTION:
        pytest.skip("this copy of the project has one task")
    others = [name for name in available_tasks() if name != "detection"]
    whole = list(Predictor(checkpoint)(files))
    for name in others:
        network = restore(checkpoint)
        for task in network.model.tasks():
            if task.name not in ("detection", name):
                task.forward = None  # to compute it would fail
        predictor = Predictor(network, tasks=[name])
        assert list(predictor.targets) == [name]
        needed = [*DETECTION, name] if name in region_tasks() else [name]
        chosen = [task for task in network.model.tasks() if task.name in needed]
        mine = {output.name for task in chosen for output in task.outputs()}
        for result, reference in zip(predictor(files), whole, strict=True):
            assert set(result.outputs) == mine
            assert_equal(result, {key: reference[key] for key in result.outputs})
    alone = Predictor(checkpoint, tasks=DETECTION)
    assert set(next(alone(files)).outputs) == {"boxes", "scores", "classes"}


def test_score_threshold(checkpoint: Path, files: list[Path]) -> None:
    whole = Predictor(checkpoint, tasks=region_tasks()).one(files[0])
    threshold = float(whole.scores.median())
    confident = Predictor(checkpoint, tasks=region_tasks(), score_thresh=threshold).one(files[0])
    keep = whole.scores >= threshold
    assert 0 < len(confident) < len(whole)
    for name, value in confident.outputs.items():
        assert torch.equal(value, whole[name][keep])


def test_broken_images_are_named_and_counted(boxes_only: Path, files: list[Path]) -> None:
    files[1].write_bytes(files[1].read_bytes()[:-400])
    files[3].write_bytes(b"")
    predictor = Predictor(boxes_only, batch_size=2, on_error="skip")
    missing = files[0].with_name("missing.png")
    results = list(predictor([*files, missing]))
    assert [result.path for result in results] == [files[0], files[2], files[4]]
    assert [skipped.name for skipped in predictor.skipped] == [str(files[1]), str(files[3]), str(missing)]
    assert "no such image file" in predictor.skipped[2].reason
    assert_equal(results[0], next(Predictor(boxes_only, batch_size=2)([files[0], files[2]])).outputs)


def test_an_error_comes_after_what_is_done(boxes_only: Path, files: list[Path]) -> None:
    files[3].write_bytes(b"no image")
    results = Predictor(boxes_only, batch_size=2)(files[0].parent)
    assert [next(results).name for _ in range(3)] == ["0.png", "1.png", "2.png"]
    with pytest.raises(UnreadableImageError, match=r"3\.png.*on_error=skip"):
        next(results)


@pytest.mark.parametrize(
    ("source", "error"),
    [
        ("nothing_here", "does not exist"),
        ("nothing_*.jpg", "no image or video matches"),
        (np.zeros((4, 5), np.uint8), r"expected an array \(H, W, 3\) of uint8"),
        (np.zeros((4, 5, 3)), "float64"),
        (7, "cannot predict on int"),
    ],
)
def test_nonsense_is_told_at_once(boxes_only: Path, source: object, error: str) -> None:
    with pytest.raises(DataError, match=error):
        Predictor(boxes_only)(source)


def test_bad_settings(boxes_only: Path, tmp_path: Path) -> None:
    for setting, error in (
        ({"tasks": ["detecton"]}, "no task 'detecton'; its tasks are detection"),
        ({"tasks": []}, "choose at least one"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"on_error": "ignore"}, "on_error=ignore"),
        ({"channel_order": "GBR"}, "channel_order=GBR"),
    ):
        with pytest.raises(ConfigError, match=error):
            Predictor(boxes_only, **setting)
    with pytest.raises(CheckpointError, match="no checkpoint in this directory"):
        Predictor(tmp_path)
    with pytest.raises(DataError, match="expected one image"):
        Predictor(boxes_only).one([images()[0], images()[1]])


def test_a_run_directory_gives_its_last_checkpoint(checkpoint: Path, files: list[Path]) -> None:
    (checkpoint.parent / "last_checkpoint").write_text(checkpoint.name)
    assert_equal(Predictor(checkpoint.parent).one(files[0]), Predictor(checkpoint).one(files[0]).outputs)


def test_a_network_can_be_given_itself(tmp_path: Path) -> None:
    network = restored(tmp_path, DETECTION)
    assert_equal(Predictor(network).one(images()[0]), Predictor(tmp_path / "network.pth").one(images()[0]).outputs)


def test_test_time_augmentation(checkpoint: Path, files: list[Path]) -> None:
    network = restore(checkpoint)
    merging = MultiViewNetwork(InferenceNetwork(network.model))
    for given, sizes in (({"flip": True}, None), ({"scales": [40, 64], "max_size": 90}, [(40, 90), (64, 90)])):
        if sizes is None:
            made = [build_augmentations(network.cfg.data.test_augment)]
        else:
            made = [[T.ResizeShortestEdge(*size)] for size in sizes]
        views = Views(made, flip=sizes is None, input_format=network.cfg.model.input_format)
        for result, image in zip(Predictor(checkpoint, tta=given, batch_size=2)(files), images(), strict=True):
            assert_equal(result, merging([views.sample(image)])[0])
    off = Predictor(checkpoint, tta={"flip": False, "scales": None}).one(files[0])
    assert_equal(off, Predictor(checkpoint).one(files[0]).outputs)
    with pytest.raises(ConfigError, match=r"tta\.scale: unknown key; known: scales, max_size, flip"):
        Predictor(checkpoint, tta={"scale": [40]})


def test_the_package_alone_imports_no_torch() -> None:
    code = "import sys, mtl_rcnn; assert 'torch' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False).returncode == 0
