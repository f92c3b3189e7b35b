"""The mapper: augment once, every target follows; a sample is a pure function; unreadable images are named."""

from __future__ import annotations

import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image, ImageFile
from standin_targets import FaultyTarget, standin_targets
from toy import Toy

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.mapper import Mapper, read_image, seeded
from mtl_rcnn.data.target import Record, valid_mask
from mtl_rcnn.data.transforms import RandomAffine
from mtl_rcnn.errors import ConfigError, DataError, UnreadableImageError

AUGMENTATIONS = [
    T.ResizeShortestEdge((60, 90), 200),
    T.RandomFlip(0.5),
    RandomAffine(rotate=(-10, 10)),
    T.RandomBrightness(0.5, 1.5),
    T.RandomCrop("relative_range", (0.7, 0.7)),
]


def _read(toy: Toy, **overrides) -> tuple[list[Record], LabelSpace]:
    (dataset,), space = build_datasets([DatasetSpec.from_config(toy.node(**overrides), str(toy.root))], {})
    return dataset.records, space


def _equal(one: dict, other: dict) -> bool:
    same = torch.equal(one["image"], other["image"]) and torch.equal(
        one["targets"]["gradient"], other["targets"]["gradient"]
    )
    boxes = [sample["instances"].gt_boxes.tensor for sample in (one, other)]
    return same and torch.equal(*boxes)


def test_sample_holds_what_the_contract_says(toy: Toy):
    records, space = _read(toy)
    sample = Mapper(standin_targets(space), [])(records[0], 7)
    assert {key: sample[key] for key in ("height", "width", "image_id", "dataset", "sample_index")} == {
        "height": 48,
        "width": 64,
        "image_id": 11,
        "dataset": "toy",
        "sample_index": 7,
    }
    assert sample["image"].shape == (3, 48, 64)
    assert sample["image"].dtype == torch.uint8
    assert sample["labelled"] == {"boxes": True, "ids": True, "gradient": True}
    instances = sample["instances"]
    assert instances.image_size == (48, 64)
    assert instances.gt_boxes.tensor.tolist() == [[8, 6, 28, 36], [34, 10, 58, 30]]
    assert instances.gt_classes.tolist() == [0, 1]
    assert instances.gt_has_ids.tolist() == [True, False]
    assert sample["ignore_boxes"].shape == (0, 4)
    assert sample["labelled_classes"].tolist() == [True, True, True]
    assert torch.equal(sample["targets"]["gradient"][0], torch.arange(64))


@pytest.mark.parametrize("order", ["BGR", "RGB"])
def test_channel_order(toy: Toy, order: str):
    records, _ = _read(toy)
    sample = Mapper({}, [], input_format=order)(records[0], 0)
    rgb = np.asarray(Image.open(records[0]["file_name"]))
    assert (sample["image"].permute(1, 2, 0).numpy() == (rgb if order == "RGB" else rgb[..., ::-1])).all()


def test_augmentations_see_the_same_pixels_in_both_orders(toy: Toy):
    records, _ = _read(toy)
    saturation = [T.RandomSaturation(0.1, 0.2)]
    bgr, rgb = (Mapper({}, saturation, input_format=order)(records[0], 0)["image"] for order in ("BGR", "RGB"))
    assert torch.equal(bgr.flip(0), rgb)


def test_sample_is_a_function_of_seed_index_and_attempt(toy: Toy):
    records, space = _read(toy)
    mapper = Mapper(standin_targets(space), AUGMENTATIONS, seed=1)
    sample = mapper(records[0], 3)
    random.seed(99)
    assert _equal(sample, pickle.loads(pickle.dumps(mapper))(records[0], 3))
    others = [
        mapper(records[0], 4),
        mapper(records[0], 3, attempt=1),
        Mapper(standin_targets(space), AUGMENTATIONS, seed=2)(records[0], 3),
    ]
    assert not any(other["image"].shape == sample["image"].shape and _equal(sample, other) for other in others)


def test_image_and_boxes_equal_detectron2s_mapper(toy: Toy):
    records, space = _read(toy)
    augmentations = [T.ResizeShortestEdge((60, 90), 200), T.RandomFlip(0.5), T.RandomCrop("relative_range", (0.7, 0.7))]
    theirs = DatasetMapper(is_train=True, augmentations=augmentations, image_format="BGR")
    ours = Mapper({"boxes": standin_targets(space)["boxes"]}, augmentations, seed=4)
    for index, record in enumerate(records):
        boxes_only = [
            {
                # As floats: Detectron2 rounds the moved corners of a box whose numbers are integers.
                "bbox": [float(number) for number in a["bbox"]],
                "bbox_mode": BoxMode.XYWH_ABS,
                "category_id": a["category_id"],
                "iscrowd": a["iscrowd"],
            }
            for a in record["annotations"]
        ]
        with seeded(4, index, 0):
            expected = theirs({**record, "annotations": boxes_only})
        sample = ours(record, index)
        assert torch.equal(sample["image"], expected["image"])
        assert torch.equal(sample["instances"].gt_boxes.tensor, expected["instances"].gt_boxes.tensor)
        assert torch.equal(sample["instances"].gt_classes, expected["instances"].gt_classes)


def test_global_generators_are_left_alone(toy: Toy):
    records, _ = _read(toy)

    def draw() -> list[float]:
        return [random.random(), np.random.rand(), float(torch.rand(1))]  # noqa: NPY002

    random.seed(0)
    np.random.seed(0)  # noqa: NPY002
    torch.manual_seed(0)
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    undisturbed = draw()
    random.setstate(states[0])
    np.random.set_state(states[1])  # noqa: NPY002
    torch.set_rng_state(states[2])
    Mapper({}, AUGMENTATIONS)(records[0], 5)
    assert draw() == undisturbed


def test_every_target_follows_one_geometry(toy: Toy):
    records, space = _read(toy)
    mapper = Mapper(standin_targets(space), [T.ResizeShortestEdge(96, 200), T.RandomFlip(1.0)])
    sample = mapper(records[0], 0)
    assert sample["image"].shape == (3, 96, 128)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[72, 12, 112, 72], [12, 20, 60, 60]]
    assert sample["targets"]["gradient"].shape == (96, 128)
    assert sample["targets"]["gradient"][0, :4].tolist() == [63, 63, 62, 62]
    painted = sample["image"][:, 40, 90]
    assert painted.tolist() == [40, 40, 230]


def test_instances_a_crop_leaves_outside_are_gone_for_every_task(toy: Toy):
    records, space = _read(toy)
    sample = Mapper(standin_targets(space), [T.CropTransform(0, 0, 30, 48)])(records[0], 0)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[8, 6, 28, 36]]
    assert sample["instances"].gt_ids.tolist() == [101]
    everything_gone = Mapper(standin_targets(space), [T.CropTransform(0, 0, 5, 5)])(records[0], 0)
    assert len(everything_gone["instances"]) == 0
    assert everything_gone["labelled"]["boxes"] is True


@pytest.mark.parametrize(("policy", "boxes"), [("background", []), ("ignore", [[40, 4, 76, 34]])])
def test_crowds_are_never_instances(toy: Toy, policy: str, boxes: list):
    records, space = _read(toy)
    sample = Mapper(standin_targets(space), [], crowd=policy)(records[2], 0)
    assert sample["instances"].gt_boxes.tensor.tolist() == [[6, 8, 24, 26]]
    assert sample["ignore_boxes"].tolist() == boxes
    cropped = Mapper(standin_targets(space), [T.CropTransform(0, 0, 30, 40)], crowd=policy)(records[2], 0)
    assert cropped["ignore_boxes"].shape == (0, 4)


def test_absent_empty_and_labelled_are_three_things(toy: Toy):
    records, space = _read(toy)
    targets = standin_targets(space)
    empty = Mapper(targets, [])(records[3], 0)
    assert empty["labelled"] == {"boxes": True, "ids": False, "gradient": True}
    assert len(empty["instances"]) == 0
    assert not empty["instances"].has("gt_ids")
    others, _ = _read(toy, tasks=["gradient"])
    absent = Mapper({name: targets[name] for name in ("boxes", "gradient")}, [])(others[0], 0)
    assert absent["labelled"] == {"boxes": False, "gradient": True}
    assert absent["instances"].get_fields() == {}
    assert valid_mask([empty, absent], "boxes").tolist() == [True, False]


def test_labelled_classes_are_those_of_the_dataset(toy: Toy):
    records, _ = _read(toy, classes=["disc"])
    space = LabelSpace(({"name": "disc"}, {"name": "star"}))
    sample = Mapper(standin_targets(space), [])(records[0], 0)
    assert sample["labelled_classes"].tolist() == [True, False]


def test_evaluation_needs_no_labels_but_gives_them_on_request(toy: Toy):
    records, space = _read(toy)
    targets = {"faulty": FaultyTarget("faulty", space, image_id=11)}
    sample = Mapper(targets, [], training=False)(records[0], 0)
    assert set(sample) == {"image", "height", "width", "image_id", "file_name", "dataset", "sample_index"}
    assert "instances" in Mapper(standin_targets(space), [], training=False, labels=True)(records[0], 0)


def test_label_faults_surface(toy: Toy):
    records, space = _read(toy)
    with pytest.raises(DataError, match="image 11: a fault"):
        Mapper({"faulty": FaultyTarget("faulty", space, image_id=11)}, [])(records[0], 0)


def test_two_targets_must_not_give_the_same_field(toy: Toy):
    records, space = _read(toy)
    targets = {**standin_targets(space), "again": standin_targets(space)["boxes"]}
    with pytest.raises(TypeError, match=r"'gt_boxes'.*'again'"):
        Mapper(targets, [])(records[0], 0)


@pytest.mark.parametrize("arguments", [{"crowd": "drop"}, {"input_format": "GRB"}, {"on_error": "ignore"}])
def test_unknown_choices_name_their_key(arguments: dict):
    with pytest.raises(ConfigError, match=rf"{next(iter(arguments))}={next(iter(arguments.values()))}: expected"):
        Mapper({}, [], **arguments)


def _jpeg_record(folder: Path, height: int = 40, width: int = 70) -> Record:
    file = folder / "photo.jpg"
    noise = np.random.default_rng(0).integers(0, 256, (40, 70, 3), dtype=np.uint8)
    Image.fromarray(noise).save(file)
    return {
        "file_name": str(file),
        "image_id": 8,
        "dataset": "photos",
        "height": height,
        "width": width,
        "annotations": [],
    }


@pytest.mark.parametrize("tolerant", [False, True])
def test_truncated_image_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tolerant: bool):
    # Other libraries set this flag for the whole process; then half an image would be grey without a word.
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", tolerant)
    record = _jpeg_record(tmp_path)
    file = Path(record["file_name"])
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(
        UnreadableImageError, match=r"photo\.jpg \(dataset 'photos', image id 8\): .*truncated.*on_error=skip"
    ):
        read_image(record)
    assert tolerant is ImageFile.LOAD_TRUNCATED_IMAGES


def test_real_truncated_image_is_named(coco_mini: Path):
    record = {"file_name": str(coco_mini.parent / "broken.jpg"), "image_id": 1, "dataset": "x", "height": 1, "width": 1}
    with pytest.raises(UnreadableImageError, match=r"broken\.jpg.*cannot be decoded"):
        read_image(record)


@pytest.mark.parametrize("content", [b"", b"not an image", b"\x89PNG\r\n\x1a\n0000"])
def test_what_is_no_image_is_named(tmp_path: Path, content: bytes):
    record = _jpeg_record(tmp_path)
    Path(record["file_name"]).write_bytes(content)
    with pytest.raises(UnreadableImageError, match=r"photo\.jpg .*cannot be decoded"):
        read_image(record)


def test_missing_image_is_named(tmp_path: Path):
    record = _jpeg_record(tmp_path)
    Path(record["file_name"]).unlink()
    with pytest.raises(UnreadableImageError, match=r"photo\.jpg \(dataset 'photos', image id 8\): no such image file"):
        read_image(record)


def test_other_size_than_recorded_is_named(tmp_path: Path):
    with pytest.raises(
        UnreadableImageError, match=r"image is 70 x 40 pixels .* says 40 x 70; correct width and height"
    ):
        read_image(_jpeg_record(tmp_path, height=70, width=40))


def test_exif_orientation_is_applied(tmp_path: Path):
    record = _jpeg_record(tmp_path, height=70, width=40)
    exif = Image.Exif()
    exif[274] = 6
    with Image.open(record["file_name"]) as image:
        upright = np.asarray(image.rotate(-90, expand=True))
        image.save(record["file_name"], exif=exif, quality=100, subsampling=0)
    turned = read_image(record)
    assert turned.shape == (70, 40, 3)
    assert np.abs(turned.astype(int) - upright).mean() < 3
    with pytest.raises(UnreadableImageError, match="EXIF orientation"):
        read_image({**record, "height": 40, "width": 70})


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_other_colour_modes_become_three_channels(tmp_path: Path, mode: str):
    record = _jpeg_record(tmp_path)
    file = tmp_path / ("photo.tif" if mode == "CMYK" else "photo.png")
    Image.open(record["file_name"]).convert(mode).save(file)
    assert read_image({**record, "file_name": str(file)}).shape == (40, 70, 3)
