"""What is particular to masks: polygons and run lengths, their geometry, forms that do not fit, pasting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pycocotools.mask as rle_codec
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers import paste_masks_in_image
from detectron2.structures import BitMasks, Boxes, PolygonMasks

from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import DataError
from mtl_rcnn.tasks.mask import MaskTarget, decode_segmentation, paste_masks, run_length_sum

HEIGHT, WIDTH = 40, 60
SQUARE = [[10.0, 5.0, 30.0, 5.0, 30.0, 25.0, 10.0, 25.0]]
PIXELS = np.zeros((HEIGHT, WIDTH), dtype=np.uint8, order="F")
PIXELS[5:25, 10:30] = 1
RLE = {"size": [HEIGHT, WIDTH], "counts": rle_codec.encode(PIXELS)["counts"].decode()}
TARGET = MaskTarget("mask", LabelSpace(({"name": "disc"},)))


def record(*segmentations: Any, tasks: tuple[str, ...] | None = None) -> dict[str, Any]:
    annotations = [
        {"id": 50 + i, "category_id": 0, "iscrowd": 0} | ({} if s is None else {"segmentation": s})
        for i, s in enumerate(segmentations)
    ]
    image = {"dataset": "toy", "image_id": 3, "height": HEIGHT, "width": WIDTH}
    return {**image, "tasks": tasks, "annotations": annotations}


def load(record: dict[str, Any], geometry: Geometry) -> dict[str, Any]:
    label = TARGET.load(record, record["annotations"], geometry)
    assert label is not None
    return label


def test_polygons_and_run_lengths_may_share_an_image() -> None:
    plain = Geometry.identity(HEIGHT, WIDTH)
    assert isinstance(load(record(SQUARE, None), plain)["gt_masks"], PolygonMasks)
    label = load(record(SQUARE, RLE, None), plain)
    assert isinstance(label["gt_masks"], BitMasks)
    assert label["gt_has_mask"].tolist() == [True, True, False]
    expected = torch.from_numpy(PIXELS.astype(bool))
    assert torch.equal(label["gt_masks"].tensor[0], expected)
    assert torch.equal(label["gt_masks"].tensor[1], expected)
    assert not label["gt_masks"].tensor[2].any()


def test_both_forms_follow_the_same_geometry() -> None:
    steps = [T.HFlipTransform(WIDTH), T.ResizeTransform(HEIGHT, WIDTH, 2 * HEIGHT, 2 * WIDTH)]
    geometry = Geometry(T.TransformList(steps), 2 * HEIGHT, 2 * WIDTH)
    polygons = load(record(SQUARE), geometry)["gt_masks"]
    pixels = load(record(RLE), geometry)["gt_masks"].tensor[0]
    drawn = BitMasks.from_polygon_masks(polygons, 2 * HEIGHT, 2 * WIDTH).tensor[0]
    assert torch.equal(drawn, pixels)
    assert pixels[10:50, 60:100].all()
    assert pixels.sum() == 1600


def test_list_run_lengths_and_text_ones_decode_alike() -> None:
    flat = PIXELS.flatten(order="F")
    changes = np.flatnonzero(np.diff(flat)) + 1
    counts = np.diff([0, *changes.tolist(), flat.size]).tolist()
    assert (decode_segmentation({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH) == PIXELS).all()
    assert (decode_segmentation(RLE, HEIGHT, WIDTH) == PIXELS).all()


@pytest.mark.parametrize(
    ("segmentation", "said"),
    [
        ([[1.0, 2.0, 3.0, 4.0]], "has a polygon of 4 numbers: expected an even number of at least 6"),
        ([[1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0]], "has a polygon of 7 numbers"),
        ([[1.0, 2.0, 3.0, float("nan"), 5.0, 6.0]], "coordinate that is not finite"),
        ({"size": [WIDTH, HEIGHT], "counts": RLE["counts"]}, r"run-length mask of size \[60, 40\]: .* = \[40, 60\]"),
        ("polygon", "run-length mask of size str"),
    ],
)
def test_a_form_that_does_not_fit_names_the_annotation(segmentation: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"dataset 'toy', image 3, annotation 51 .*{said}"):
        TARGET.check(record(SQUARE, segmentation))


def test_a_declared_mask_that_is_missing_is_an_error_and_an_undeclared_one_is_absent() -> None:
    with pytest.raises(
        DataError, match=r"annotation 50 has no 'segmentation', but the dataset declares the task 'mask'"
    ):
        TARGET.check(record(None, tasks=("mask",)))
    assert TARGET.check(record(None, SQUARE)).instances == 1
    assert not TARGET.check(record(SQUARE, tasks=("detection",))).image


def test_pasting_equals_detectron2s_for_boxes_inside_across_and_tiny() -> None:
    generator = torch.Generator().manual_seed(0)
    grids = torch.rand(4, 28, 28, generator=generator)
    boxes = torch.tensor(
        [[3.2, 4.7, 30.1, 33.0], [0.0, 0.0, 60.0, 40.0], [50.5, 30.2, 60.0, 40.0], [7.0, 7.0, 7.6, 8.1]]
    )
    expected = paste_masks_in_image(grids, Boxes(boxes), (HEIGHT, WIDTH))
    found = paste_masks(grids, boxes, torch.tensor([HEIGHT, WIDTH]))
    assert torch.equal(found, expected)
    assert found.any(dim=(1, 2)).tolist()[:3] == [True] * 3
    assert paste_masks(grids[:0], boxes[:0], torch.tensor([HEIGHT, WIDTH])).shape == (0, HEIGHT, WIDTH)


def test_run_lengths_are_summed_as_pycocotools_reads_them() -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        height, width = rng.integers(1, 150, 2)
        mask = np.asfortranarray((rng.random((height, width)) < rng.random() ** 3).astype(np.uint8))
        compressed = rle_codec.encode(mask)["counts"].decode()
        assert run_length_sum(compressed) == height * width
        assert run_length_sum(compressed[:-1]) != height * width


@pytest.mark.parametrize("counts", ["", "é", "\x00", "oooooooooooo1", "o", [1, -1], [1.5], ["1"], [2**40], None, 5])
def test_what_are_no_run_lengths(counts: Any) -> None:
    assert run_length_sum(counts) is None
