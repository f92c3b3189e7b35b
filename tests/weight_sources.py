"""Networks of Detectron2 and torchvision with visible random weights, their files, and networks that import them."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import torch
import torchvision
from omegaconf import DictConfig
from reference import copy_weights, detectron2_rcnn, randomise_statistics
from tiny import LABEL_SPACE, tiny_config, tiny_model
from torch import nn

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

TASKS = ("detection", "mask", "keypoint")
LIKE_DETECTRON2 = [
    "model.backbone.width=64",
    "model.pixel_std=[1.0,1.0,1.0]",
    "+tasks.keypoint.shared_schemas.disc=figure",
]


def config(tasks: tuple[str, ...], weights: Path | str, *overrides: str) -> DictConfig:
    return tiny_config(tasks, f"checkpoint.weights={weights}", *overrides)


def imported(cfg: DictConfig, label_space: LabelSpace = LABEL_SPACE) -> MultiTaskRCNN:
    model = build_model(cfg, label_space)
    load_initial_weights(cfg, model, label_space)
    return model.eval()


def stock(seed: int) -> nn.Module:
    """Detectron2's network with visible random weights."""
    ours = tiny_model(TASKS, *LIKE_DETECTRON2)
    randomise_statistics(ours, seed)
    theirs = detectron2_rcnn(2, 3)
    copy_weights(ours, theirs)
    return theirs.eval()


def write_zoo_pickle(path: Path, model: nn.Module, protocol: int, **more: Any) -> None:
    """As Detectron2's model zoo publishes its networks."""
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo", **more}, protocol))


TORCHVISION = [
    *("model.backbone.width=64", "model.input_format=RGB", "model.pixel_mean=[123.675,116.28,103.53]"),
    "model.pixel_std=[58.395,57.12,57.375]",
]


def torchvision_network(kind: type[nn.Module], **more: Any) -> nn.Module:
    """A torchvision detector on a narrow ResNet-18 pyramid, with visible random weights."""
    torch.manual_seed(0)
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    network = kind(backbone, **more)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return network.eval()


WIDE = [
    *("model.backbone.fpn_channels=256", "tasks.detection.fc_dims=[1024,1024]"),
    "tasks.detection.rpn.anchor_sizes=[[32],[64],[128],[256],[512]]",
]
