"""A network small enough for tests, by configuration, and batches for it that need no files."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances, Keypoints, PolygonMasks
from omegaconf import DictConfig, OmegaConf
from toy import VOCABULARIES

from mtl_rcnn.config import compose
from mtl_rcnn.config.resolve import resolve
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.slots import RegionTask, Task

CONFIGS = Path(__file__).resolve().parents[1] / "configs"

LABEL_SPACE = LabelSpace(
    (
        {"name": "figure", "keypoints": ["left_hand", "right_hand", "head"], "skeleton": [[1, 3], [2, 3]]},
        {"name": "disc"},
    ),
    VOCABULARIES,
)

NETWORK = [
    "model=resnet18_fpn_scratch",
    "model.backbone.width=8",
    "model.backbone.fpn_channels=16",
    "model.regions.batch_size_per_image=32",
]
"""Overrides of any network."""

TASKS = {
    "detection": [
        "tasks.detection.rpn.anchor_sizes=[[16],[32],[64],[128],[256]]",
        "tasks.detection.rpn.pre_nms_topk=[200,100]",
        "tasks.detection.rpn.post_nms_topk=[100,50]",
        "tasks.detection.fc_dims=[32,32]",
    ],
    "mask": ["tasks.mask.conv_dims=[16,16,16]"],
    "keypoint": ["tasks.keypoint.conv_dims=[16,16]"],
    "attribute": ["tasks.attribute.fc_dims=[16]"],
    "semantic": ["tasks.semantic.decoder.conv_dim=32"],
    "depth": ["tasks.depth.decoder.conv_dim=32"],
    "text": ["tasks.text.conv_dim=16", "tasks.text.hidden_dim=8", "tasks.text.fc_dim=16"],
}
"""Overrides of each task that has knobs worth shrinking."""


def available_tasks() -> list[str]:
    """Names of all tasks in the configuration folder."""
    return sorted(path.stem for path in (CONFIGS / "tasks").glob("*.yaml"))


def region_tasks() -> list[str]:
    """Those of them that work on boxes, the detector among them."""
    targets = {name: OmegaConf.load(CONFIGS / "tasks" / f"{name}.yaml")._target_ for name in available_tasks()}
    return [name for name, target in targets.items() if issubclass(resolve(target, Task, name), RegionTask)]


def need_tasks(*names: str) -> None:
    """Skips a test of tasks that are not part of this copy of the project."""
    missing = [name for name in names if name not in available_tasks()]
    if missing:
        pytest.skip(f"this copy of the project has no task {', '.join(missing)}")


def tiny_config(tasks: Sequence[str], *overrides: str) -> DictConfig:
    """The training configuration of a tiny network with these tasks."""
    need_tasks(*tasks)
    knobs = [knob for task in tasks for knob in TASKS.get(task, [])]
    return copy.deepcopy(_composed(f"tasks=[{','.join(tasks)}]", "data.root=unused", *NETWORK, *knobs, *overrides))


@cache
def _composed(*overrides: str) -> DictConfig:
    """Composing takes a second, and many tests ask for the same."""
    return compose("train", overrides)


def tiny_model(tasks: Sequence[str], *overrides: str) -> MultiTaskRCNN:
    """A tiny network with random weights."""
    return build_model(tiny_config(tasks, *overrides), LABEL_SPACE)


def make_sample(
    seed: int, size: tuple[int, int], objects: int, labelled: Mapping[str, bool] | None = None, **labels: Any
) -> Sample:
    """A random image of `size` (height, width) with boxes, polygons and points of `objects` random instances.

    Args:
        labelled: task -> whether the image is labelled; all RoI tasks by default.
        labels: `has_mask`, `has_keypoint`: (objects,) bool, which instances carry the label.
    """
    rng = np.random.default_rng(seed)
    height, width = size
    corner = rng.uniform(0, [width - 40, height - 40], (objects, 2))
    boxes = np.concatenate([corner, corner + rng.uniform(12, 40, (objects, 2))], axis=1)
    points = rng.uniform(boxes[:, None, :2], boxes[:, None, 2:], (objects, 3, 2))
    visible = rng.integers(0, 3, (objects, 3, 1))
    everything = torch.ones(objects, dtype=torch.bool)
    instances = Instances(size)
    instances.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32))
    instances.gt_classes = torch.tensor(rng.integers(0, 2, objects))
    instances.gt_masks = PolygonMasks(
        [[np.array([x0, y0, x1, y0, x1, y1, (x0 + x1) / 2, y1 - 3])] for x0, y0, x1, y1 in boxes]
    )
    instances.gt_keypoints = Keypoints(np.concatenate([points, visible], axis=2))
    instances.gt_has_mask = labels.get("has_mask", everything)
    instances.gt_has_keypoint = labels.get("has_keypoint", torch.tensor((visible[:, :, 0] > 0).any(axis=1)))
    return {
        "image": torch.tensor(rng.integers(0, 256, (3, height, width)), dtype=torch.uint8),
        "height": height * 2,
        "width": width * 2 - 1,
        "image_id": seed,
        "file_name": f"{seed}.png",
        "dataset": "random",
        "sample_index": seed,
        "instances": instances,
        "targets": {},
        "ignore_boxes": torch.zeros(0, 4),
        "labelled_classes": torch.ones(2, dtype=torch.bool),
        "labelled": dict(labelled or {"detection": True, "mask": True, "keypoint": True}),
    }
