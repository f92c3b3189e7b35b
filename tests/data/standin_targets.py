"""Targets of made-up tasks, for tests of the data layer: it must work with any."""

from __future__ import annotations

import os

import numpy as np
import torch
from detectron2.structures import Boxes

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, ImageTarget, InstanceTarget, Target
from mtl_rcnn.errors import DataError


class _StandIn:
    def check(self, record):
        return Coverage(image=True)

    def as_prediction(self, sample):
        return {}

    def draw(self, canvas, prediction):
        return None


class BoxTarget(_StandIn, InstanceTarget):
    """Boxes and classes; not labelled where the dataset declares tasks without it."""

    def load(self, record, annotations, geometry):
        if self.declared(record) is False:
            return None
        corners = np.array([a["bbox"] for a in annotations], dtype=float).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        boxes = torch.as_tensor(geometry.boxes(corners), dtype=torch.float32)
        classes = torch.tensor([a["category_id"] for a in annotations], dtype=torch.int64)
        return {"gt_boxes": Boxes(boxes), "gt_classes": classes}


class IdTarget(_StandIn, InstanceTarget):
    """The ids of annotations, of which even ones are unlabelled; no image without `keypoints` is labelled."""

    def load(self, record, annotations, geometry):
        if not any("keypoints" in a for a in annotations):
            return None
        ids = torch.tensor([a["id"] for a in annotations])
        return {"gt_ids": ids, f"gt_has_{self.name}": ids % 2 == 1}


class GradientTarget(_StandIn, ImageTarget):
    """A label map whose value is the column; only labelled where the dataset declares it, or declares nothing."""

    def load(self, record, geometry):
        if self.declared(record) is False:
            return None
        columns = np.indices((record["height"], record["width"]))[1]
        return torch.from_numpy(geometry.raster(columns.astype(np.int64)))


class FaultyTarget(_StandIn, ImageTarget):
    """Finds fault with one image: a DataError, or a bug of its own."""

    def __init__(self, name: str, label_space: LabelSpace, image_id: int, bug: bool = False) -> None:
        super().__init__(name, label_space)
        self.image_id = image_id
        self.bug = bug

    def load(self, record, geometry):
        if record["image_id"] == self.image_id and self.bug:
            raise KeyError("forgotten")
        if record["image_id"] == self.image_id:
            raise DataError(f"{record['file_name']}, image {record['image_id']}: a fault")
        return torch.zeros(1)


class HeavyTarget(_StandIn, ImageTarget):
    """Labels that fill the pipe between a worker and the main process many times over."""

    def load(self, record, geometry):
        return bytes(500_000)


class DeadlyTarget(_StandIn, ImageTarget):
    """Ends the process at one image, as a decoder that crashes or memory that is out does."""

    def __init__(self, name: str, label_space: LabelSpace, image_id: int, signal: int) -> None:
        super().__init__(name, label_space)
        self.image_id, self.signal = image_id, signal

    def load(self, record, geometry):
        if record["image_id"] == self.image_id:
            os.kill(os.getpid(), self.signal)
        return torch.zeros(1)


def standin_targets(space: LabelSpace) -> dict[str, Target]:
    """One of each kind."""
    return {
        "boxes": BoxTarget("boxes", space),
        "ids": IdTarget("ids", space),
        "gradient": GradientTarget("gradient", space),
    }
