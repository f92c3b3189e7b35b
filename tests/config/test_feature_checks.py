"""Which augmentations give an image one view, told from the configuration alone."""

from __future__ import annotations

import numpy as np
import pytest

from mtl_rcnn.config import compose
from mtl_rcnn.data.mapper import seeded
from mtl_rcnn.data.transforms import build_augmentations
from mtl_rcnn.errors import ConfigError

D2, OURS = "detectron2.data.transforms", "mtl_rcnn.data.transforms"
FIXED = [
    f"{{_target_: {D2}.Resize, shape: [8, 12]}}",
    f"{{_target_: {D2}.ResizeShortestEdge, short_edge_length: 8}}",
    f"{{_target_: {D2}.ResizeShortestEdge, short_edge_length: [8], sample_style: choice}}",
    f"{{_target_: {D2}.ResizeShortestEdge, short_edge_length: [8, 8], sample_style: range}}",
    f"{{_target_: {D2}.RandomFlip, prob: 0}}",
    f"{{_target_: {D2}.HFlipTransform, width: 24}}",
    f"{{_target_: {D2}.CropTransform, x0: 1, y0: 2, w: 9, h: 8}}",
]
RANDOM = {
    f"{{_target_: {D2}.ResizeShortestEdge, short_edge_length: [8, 10], sample_style: choice}}": ".short_edge_length=10",
    f"{{_target_: {D2}.ResizeShortestEdge, short_edge_length: [6, 9], sample_style: range}}": ".short_edge_length=9",
    f"{{_target_: {D2}.RandomFlip, prob: 0.5}}": "=null",
    f"{{_target_: {D2}.RandomCrop, crop_type: absolute, crop_size: [8, 8]}}": "=null",
    f"{{_target_: {D2}.RandomBrightness, intensity_min: 0.5, intensity_max: 1.5}}": "=null",
    f"{{_target_: {OURS}.RandomAffine, rotate: [-20, 20]}}": "=null",
}
KEPT = ("data.root=x", "solver.freeze=[trunk]", "model.cache_features=ram")
NONE = ("data.train_augment.resize=null", "data.train_augment.flip=null")


def views(entry: str) -> set[bytes]:
    """What an image may look like, in 40 draws."""
    node = compose("train", ["data.root=x", *NONE, f"+data.train_augment.own={entry}"]).data.train_augment
    image = np.random.default_rng(0).integers(0, 256, (16, 24, 3), dtype=np.uint8)
    (augmentation,) = build_augmentations(node)
    found = set()
    for draw in range(40):
        with seeded(draw):
            transform = augmentation.get_transform(image) if hasattr(augmentation, "get_transform") else augmentation
            found.add(transform.apply_image(image).tobytes())
    return found


@pytest.mark.parametrize("entry", FIXED)
def test_what_gives_one_view_passes(entry: str) -> None:
    assert len(views(entry)) == 1
    compose("train", [*KEPT, *NONE, f"+data.train_augment.own={entry}"])


@pytest.mark.parametrize("entry", RANDOM)
def test_what_draws_is_told_with_what_to_set(entry: str) -> None:
    assert len(views(entry)) > 1
    with pytest.raises(ConfigError) as raised:
        compose("train", [*KEPT, *NONE, f"+data.train_augment.own={entry}"])
    fix = f"data.train_augment.own{RANDOM[entry]}"
    assert f"data.train_augment.own draws another each time; add {fix}, or set" in str(raised.value)
    compose("train", [*KEPT, *NONE, f"+data.train_augment.own={entry}", fix])


def test_a_pattern_is_left_to_the_network() -> None:
    compose("train", ["data.root=x", "solver.freeze=[backbone.*]", "model.cache_features=folder", *NONE])
    with pytest.raises(ConfigError, match=r"solver\.freeze=\[trunk\], or set model\.cache_features=null"):
        compose("train", ["data.root=x", "solver.freeze=[detection]", "model.cache_features=folder", *NONE])
    with pytest.raises(ConfigError, match=r"model\.cache_features=True: expected null, ram, or a folder"):
        compose("train", ["data.root=x", "solver.freeze=[trunk]", "model.cache_features=true", *NONE])
