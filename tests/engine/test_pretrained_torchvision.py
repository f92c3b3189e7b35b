"""Weights of torchvision: equal outputs of every module, whatever the conventions."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torchvision
from tiny import tiny_model
from torch import nn
from torchvision.models.detection import keypoint_rcnn, mask_rcnn
from weight_sources import (
    LIKE_DETECTRON2,
    TASKS,
    TORCHVISION,
    WIDE,
    config,
    imported,
    stock,
    torchvision_network,
)

from mtl_rcnn.engine.pretrained.names import rename
from mtl_rcnn.engine.pretrained.norms import fit_norms
from mtl_rcnn.engine.pretrained.weight_file import read_weight_file
from mtl_rcnn.errors import CheckpointError, ConfigError


def test_a_torchvision_mask_rcnn_gives_equal_outputs_per_module(tmp_path: Path) -> None:
    tasks = ("detection", "mask")
    theirs = torchvision_network(mask_rcnn.MaskRCNN, num_classes=3)
    path = tmp_path / "maskrcnn.pth"
    torch.save({"model": theirs.state_dict(), "epoch": 3}, path)
    widths = [*TORCHVISION, *WIDE, "tasks.mask.conv_dims=[256,256,256,256,256]"]
    ours = imported(config(tasks, path, *widths))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 96, generator=generator)
    pooled, small = torch.randn(5, 256, 7, 7, generator=generator), torch.randn(2, 256, 14, 14, generator=generator)
    with torch.no_grad():
        features, reference = ours.backbone(image), theirs.backbone(image)
        for mine, other in zip(["p2", "p3", "p4", "p5", "p6"], ["0", "1", "2", "3", "pool"], strict=True):
            torch.testing.assert_close(features[mine], reference[other], rtol=1e-5, atol=1e-5)
        detector, heads = ours.roi_heads.detector, theirs.roi_heads
        logits, deltas = detector.rpn.rpn_head([features["p3"]])
        their_logits, their_deltas = theirs.rpn.head([reference["1"]])
        torch.testing.assert_close(logits[0], their_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(deltas[0], their_deltas[0], rtol=1e-5, atol=1e-5)
        scores, boxes = detector.box_predictor(detector.box_head(pooled))
        their_scores, their_boxes = heads.box_predictor(heads.box_head(pooled))
        torch.testing.assert_close(scores, their_scores[:, [1, 2, 0]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(boxes, their_boxes[:, 4:], rtol=1e-5, atol=1e-5)
        masks = ours.roi_heads.tasks["mask"](small)
        torch.testing.assert_close(masks, heads.mask_predictor(heads.mask_head(small))[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_torchvision_keypoint_rcnn_is_grafted_beside_a_mask_head(tmp_path: Path) -> None:
    mask = torchvision_network(mask_rcnn.MaskRCNN, num_classes=3)
    keypoint = torchvision_network(keypoint_rcnn.KeypointRCNN, num_classes=2, num_keypoints=3)
    paths = [tmp_path / "mask.pth", tmp_path / "keypoint.pth"]
    for path, network in zip(paths, (mask, keypoint)):
        torch.save(network.state_dict(), path)
    wide = ["tasks.mask.conv_dims=[256,256,256,256,256]", f"tasks.keypoint.conv_dims={[512] * 8}"]
    cfg = config(TASKS, paths[0], *TORCHVISION, *WIDE, *wide, f"+checkpoint.graft.keypoint={paths[1]}")
    ours = imported(cfg)
    pooled = torch.randn(2, 256, 14, 14, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        heads = keypoint.roi_heads
        expected = heads.keypoint_predictor(heads.keypoint_head(pooled))
        torch.testing.assert_close(ours.roi_heads.tasks["keypoint"](pooled), expected, rtol=1e-5, atol=1e-5)
        heads = mask.roi_heads
        expected = heads.mask_predictor(heads.mask_head(pooled))[:, 1:]
        torch.testing.assert_close(ours.roi_heads.tasks["mask"](pooled), expected, rtol=1e-5, atol=1e-5)


def test_a_torchvision_resnet_gives_equal_features_whatever_its_epsilon(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None).eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    tasks = ("detection",)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer2(theirs.layer1(stem))
        fitting = imported(config(tasks, path, *TORCHVISION, "checkpoint.source_eps=0.1")).backbone.bottom_up(image)
        other = imported(config(tasks, path, *TORCHVISION)).backbone.bottom_up(image)
    torch.testing.assert_close(fitting["res3"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other["res3"], expected, rtol=1e-2, atol=1e-2)


def test_classes_of_torchvision_are_never_one_place_off(tmp_path: Path) -> None:
    """Its box and mask layers have rows for the background: with a class less than the run has, their shapes fit."""
    torch.save(torchvision_network(mask_rcnn.MaskRCNN, num_classes=2).state_dict(), tmp_path / "one.pth")
    widths = [*TORCHVISION, *WIDE, "tasks.mask.conv_dims=[256,256,256,256,256]"]
    cfg = config(("detection", "mask"), tmp_path / "one.pth", *widths)
    cfg.checkpoint.reinit = ["roi_heads.detector.box_predictor.cls_score.*"]
    with pytest.raises(CheckpointError, match=r"missing in the file: .*bbox_pred"):
        imported(cfg)


def test_pixels_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(ConfigError) as error:
        imported(config(("detection",), path, "model.backbone.width=64"))
    advised = str(error.value).split("; add ")[1].split()
    assert "model.input_format=RGB" in advised
    imported(config(("detection",), path, "model.backbone.width=64", *advised))
    state = stock(seed=1).state_dict() | {"pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": state}, path)
    with pytest.raises(ConfigError, match=r"model\.pixel_mean=\[1,1,1\]"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))


def test_epsilon_zero_keeps_channels_without_variance_finite() -> None:
    """As in torchvision's official detectors, whose batch norms add nothing to the variance."""
    theirs = torchvision.ops.FrozenBatchNorm2d(3, eps=0.0)
    theirs.load_state_dict(
        {
            "weight": torch.tensor([1e-20, 0.5, 2.0]),
            "bias": torch.tensor([0.1, 0.2, 0.3]),
            "running_mean": torch.tensor([0.0, 1.0, -1.0]),
            "running_var": torch.tensor([1e-40, 1e-5, 4.0]),
        }
    )
    ours = nn.Sequential(nn.BatchNorm2d(3)).eval()
    ours.load_state_dict(fit_norms({f"0.{name}": value for name, value in theirs.state_dict().items()}, ours, 0.0))
    image = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    image[:, 0] = 0  # a dead channel: its input is its mean
    found, expected = ours(image), theirs(image)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "eps"), [("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", 0.0), ("r50_fpn_coco-mine.pth", 1e-5)]
)
def test_official_coco_files_have_epsilon_zero(tmp_path: Path, name: str, eps: float) -> None:
    torch.save(torchvision_network(mask_rcnn.MaskRCNN, num_classes=3).state_dict(), tmp_path / name)
    widths = [*TORCHVISION, *WIDE, "tasks.mask.conv_dims=[256,256,256,256,256]"]
    model = tiny_model(("detection", "mask"), *widths)
    assert rename(read_weight_file(str(tmp_path / name)), model).eps == eps


def test_a_network_with_further_layers_is_another_network(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict() | {"layer1.0.se.fc1.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "seresnet18.pth")
    with pytest.raises(CheckpointError, match=r"no place for \(layer1\.0\.se\.fc1\.weight"):
        imported(config(("detection",), tmp_path / "seresnet18.pth", *TORCHVISION))
