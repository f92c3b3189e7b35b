"""The small VGG and what a fixed input size asks for: its parameters, other sizes, export and prediction."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from tiny import LABEL_SPACE, need_tasks
from torch import Tensor

from mtl_rcnn.config import compose
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine import checkpoint
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.export.export import preprocessing
from mtl_rcnn.export.torchscript import export_torchscript
from mtl_rcnn.modeling.backbone import trunk_layers
from mtl_rcnn.modeling.small_vgg import SmallVGG
from mtl_rcnn.predict import Predictor
from mtl_rcnn.runtime import ExportedNetwork

SQUARE = "{_target_: detectron2.data.transforms.Resize, shape: [96, 96]}"
SIX = LabelSpace((), {"image_labels": [{"name": str(index)} for index in range(6)]})


def config(*overrides: str) -> DictConfig:
    need_tasks("image_label")
    words = ["tasks=[image_label]", "model=small_vgg", "tasks.image_label.levels=[dense]", "data.root=unused"]
    sizes = ["data.test_augment.resize=null", f"+data.test_augment.square={SQUARE}"]
    return compose("train", [*words, *sizes, *overrides])


def test_it_has_the_parameters_of_the_source() -> None:
    model = build_model(config(), SIX)
    learned = sum(parameter.numel() for parameter in model.parameters())
    measured = sum(m.running_mean.numel() + m.running_var.numel() for m in model.modules() if hasattr(m, "running_var"))
    assert measured == 1_408
    assert learned + measured == 9_177_550


@torch.no_grad()
def test_its_one_level_sees_the_whole_image() -> None:
    torch.manual_seed(0)
    trunk = SmallVGG(dense=16, dropout=(0.25, 0.4)).eval()
    images = torch.randn(2, 3, 96, 96)
    (level,) = trunk(images).values()
    assert level.shape == (2, 16, 1, 1)
    assert trunk.output_shape()["dense"].channels == 16
    by_hand = images
    for block in (trunk.block1, trunk.block2, trunk.block3):
        for module in block:
            by_hand = module(by_hand)
    assert by_hand.shape == (2, 128, 8, 8)
    linear = trunk.dense[1]
    torch.testing.assert_close(level[:, :, 0, 0], torch.relu(by_hand.flatten(1) @ linear.weight.t() + linear.bias))
    for size in ((192, 192), (60, 130)):
        assert trunk(torch.randn(1, 3, *size))["dense"].shape == (1, 16, 1, 1)
    assert len(trunk_layers(trunk)) == 4


def test_the_default_levels_are_told_not_to_be_there() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.image_label\.levels=\[p2,p3,p4,p5\]: .* which are dense"):
        build_model(config("tasks.image_label.levels=[p2,p3,p4,p5]"), SIX)


@pytest.mark.parametrize(
    ("shape", "size"), [("[96, 64]", [96, 64]), ("48", [48, 48])], ids=["height and width", "square"]
)
def test_a_fixed_size_is_written_to_the_manifest(shape: str, size: list[int]) -> None:
    cfg = config(f"data.test_augment.square.shape={shape}")
    assert preprocessing(cfg) | {"interpolation": ""} == {
        "short_edge": None,
        "max_size": None,
        "size": size,
        "channel_order": "RGB",
        "values": [0, 255],
        "interpolation": "",
    }
    both = compose("train", ["tasks=[image_label]", "data.root=unused", f"+data.test_augment.square={SQUARE}"])
    with pytest.raises(ConfigError, match="one ResizeShortestEdge or Resize, found"):
        preprocessing(both)


@pytest.fixture(scope="module")
def photo() -> np.ndarray:
    """(H, W, 3): smooth, so that two ways to resize agree."""
    rows, columns = np.indices((70, 110)) / 20
    return np.stack([127 + 120 * np.sin(rows + index * columns) for index in range(3)], axis=-1).astype(np.uint8)


def write_run(path: Path) -> Path:
    cfg = config("model.backbone.dense=32")
    torch.manual_seed(0)
    model = build_model(cfg, LABEL_SPACE)
    state: dict[str, Any] = dict.fromkeys(checkpoint.KEYS)
    state |= {"format": checkpoint.FORMAT, "iteration": 0, "model": model.state_dict(), "versions": {}}
    checkpoint.save(path, state | {"label_space": LABEL_SPACE.state(), "config": OmegaConf.to_container(cfg)})
    return path


@pytest.mark.parametrize("method", ["trace", "script"])
def test_a_file_of_it_predicts_on_any_image_what_the_network_does(
    method: str, photo: np.ndarray, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "network.pth")
    cfg = config("model.backbone.dense=32")
    model = build_model(cfg, LABEL_SPACE)
    model.load_state_dict(torch.load(run, weights_only=True)["model"])
    images: list[Tensor] = [torch.randint(0, 256, (3, 96, 96), dtype=torch.uint8)]
    origin = {"config": OmegaConf.to_container(cfg, resolve=True)}
    given = (model, LABEL_SPACE, images, tmp_path / "out", preprocessing(cfg), origin)
    manifest = export_torchscript(*given, min_detections=0, method=method)
    assert {tuple(case["network_sizes"][0]) for case in manifest["certificate"]} >= {(96, 96), (77, 77), (125, 125)}
    assert [entry["name"] for entry in manifest["image_labels"]] == ["red", "blue", "day", "night"]
    exported = ExportedNetwork(tmp_path / "out")
    image = torch.from_numpy(photo.transpose(2, 0, 1).copy())
    assert exported.preprocess(image).shape == (3, 96, 96)
    alone = Predictor(run, device="cpu").one(photo)["label_scores"]
    np.testing.assert_allclose(exported(image)["label_scores"], alone, atol=2e-3)  # Pillow's resize and torch's round
    Image.fromarray(photo).save(tmp_path / "photo.png")
    through = Predictor(tmp_path / "out" / "model.ts", device="cpu").one(tmp_path / "photo.png")["label_scores"]
    np.testing.assert_allclose(through, alone, atol=2e-3)
