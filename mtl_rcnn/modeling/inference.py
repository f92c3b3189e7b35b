"""The network at test time, on plain tensors: one module that runs as it is, is traced, and is scripted.

Whatever depends on how many images, boxes or pixels there are stands in functions that TorchScript compiles even
while it traces (`script_if_tracing`): a trace holds their loops, and takes their devices from their inputs.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.data.target import GivenBoxes, Prediction
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.pooling import RegionPooler
from mtl_rcnn.modeling.slots import Features

if TYPE_CHECKING:
    from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
    from mtl_rcnn.modeling.roi_heads import MultiTaskROIHeads


class InferenceNetwork(nn.Module):
    """What `MultiTaskRCNN` predicts, over the same layers (nothing is copied).

    Args:
        model: the network.
        names: tasks to keep; None keeps all. The others' parameters are not part of this module.

    Raises:
        ConfigError: an unknown task, none at all, or tasks on boxes without the detector.
    """

    def __init__(self, model: MultiTaskRCNN, names: Collection[str] | None = None) -> None:
        super().__init__()
        tasks = chosen_tasks(model, names)
        self.names = tasks
        self.backbone = model.backbone
        self.size_divisibility = int(model.backbone.size_divisibility)
        self.register_buffer("pixel_mean", model.pixel_mean, persistent=False)
        self.register_buffer("pixel_std", model.pixel_std, persistent=False)
        self.regions = RegionNetwork(model.roi_heads, tasks) if _has_detector(model, tasks) else None
        self.image_tasks = nn.ModuleList(task for task in model.image_tasks.values() if task.name in tasks)

    def forward(self, images: list[Tensor], sizes: list[Tensor]) -> list[dict[str, Tensor]]:
        """One prediction per image, in its original frame.

        Args:
            images: (3, H, W) each, network frame, values 0..255, of any sizes; a batch is padded at the right and at
                the bottom, which changes results a little: compare equal batches.
            sizes: (2,) int64 each, original height and width.
        """
        pixels = normalised_batch(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        features = self.backbone(pixels)
        network_sizes = torch.stack([size_of(image, self.pixel_mean) for image in images])
        image_sizes = torch.stack([at_device_of(size, self.pixel_mean) for size in sizes])
        return self._predictions(len(images), features, size_of(pixels, pixels), network_sizes, image_sizes)

    def predict_with_given(
        self, images: list[Tensor], sizes: list[Tensor], given: Sequence[GivenBoxes]
    ) -> tuple[list[Prediction], list[Prediction]]:
        """What `forward` gives, and what the RoI tasks say of given boxes of the same images. The trunk runs once; not
        exported.

        Args:
            given: per image.
        """
        assert self.regions is not None, "only a network with a detector describes boxes"
        pixels = normalised_batch(images, self.pixel_mean, self.pixel_std, self.size_divisibility)
        features = self.backbone(pixels)
        network_sizes = torch.stack([size_of(image, self.pixel_mean) for image in images])
        image_sizes = torch.stack([at_device_of(size, self.pixel_mean) for size in sizes])
        predictions = self._predictions(len(images), features, size_of(pixels, pixels), network_sizes, image_sizes)
        rows = given_rows(given, network_sizes, image_sizes)
        rows |= self.regions.describe(features, rows, len(images))
        described = [
            self.regions.to_image(rows, index, *pair) for index, pair in enumerate(zip(network_sizes, image_sizes))
        ]
        return predictions, described

    def _predictions(
        self, images: int, features: Features, padded_size: Tensor, network_sizes: Tensor, image_sizes: Tensor
    ) -> list[dict[str, Tensor]]:
        predictions: list[dict[str, Tensor]] = [{} for _ in range(images)]
        if self.regions is not None:
            rows = self.regions(features, network_sizes)
            for index, prediction in enumerate(predictions):
                prediction.update(self.regions.to_image(rows, index, network_sizes[index], image_sizes[index]))
        for task in self.image_tasks:
            decoded = task.decode(task(features), padded_size)
            for index, prediction in enumerate(predictions):
                mine: dict[str, Tensor] = {}
                for key, value in decoded.items():
                    mine[key] = value[index]
                prediction.update(task.to_image(mine, network_sizes[index], image_sizes[index]))
        return predictions


class RegionNetwork(nn.Module):
    """The detector and the RoI tasks at test time.

    Args:
        heads: where they live.
        names: RoI tasks to keep; None keeps all.
    """

    def __init__(self, heads: MultiTaskROIHeads, names: Collection[str] | None = None) -> None:
        super().__init__()
        kept = [task for name, task in heads.tasks.items() if names is None or name in names]
        self.detector = heads.detector
        self.detector_pooler = RegionPooler(heads.poolers[heads.detector.name], heads.detector.in_features)
        self.tasks = nn.ModuleList(kept)
        self.poolers, self.pooler_of = _distinct(RegionPooler(heads.poolers[t.name], t.in_features) for t in kept)

    def forward(self, features: Features, network_sizes: Tensor) -> dict[str, Tensor]:
        """Detections of all B images in the network frame with what every RoI task says of them, as rows.

        Args:
            features: pyramid levels, (B, C, H, W) each.
            network_sizes: (B, 2) int64 height and width without padding.
        """
        rows = self.detect(features, network_sizes)
        rows.update(self.describe(features, rows, network_sizes.shape[0]))
        return rows

    @torch.jit.export
    def detect(self, features: Features, network_sizes: Tensor) -> dict[str, Tensor]:
        """Detections alone; arguments as of `forward`."""
        boxes = self.detector.proposals(features, network_sizes)
        raw = self.detector(self.detector_pooler(features, boxes))
        return self.detector.decode(raw, boxes, network_sizes)

    @torch.jit.export
    def describe(self, features: Features, rows: dict[str, Tensor], images: int) -> dict[str, Tensor]:
        """What every RoI task says of given detections: `rows` holds boxes (N, 4), classes (N,), image_index (N,)
        of so many images, in image order."""
        boxes = [rows["boxes"][rows["image_index"] == index] for index in range(images)]
        described: dict[str, Tensor] = {}
        pooled = self.pool(features, boxes)
        for index, task in enumerate(self.tasks):
            raw = task(pooled[self.pooler_of[index]])
            described.update(task.decode(raw, rows["boxes"], rows["classes"], rows["image_index"]))
        return described

    @torch.jit.export
    def pool(self, features: Features, boxes: list[Tensor]) -> list[Tensor]:
        """The boxes' features (R, C, S, S), once for all tasks that pool alike: task i's are number `pooler_of[i]`."""
        pooled: list[Tensor] = []
        for pooler in self.poolers:
            pooled.append(pooler(features, boxes))
        return pooled

    @torch.jit.export
    def to_image(
        self, rows: dict[str, Tensor], index: int, network_size: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """One image's rows in its original frame: boxes are scaled, clipped, and dropped where nothing is left."""
        decoded, boxes, scale = self.image_rows(rows, index, network_size, image_size)
        prediction = {"boxes": boxes, "scores": decoded["scores"], "classes": decoded["classes"]}
        for task in self.tasks:
            prediction.update(task.to_image(decoded, boxes, scale, image_size))
        return prediction

    @torch.jit.export
    def image_rows(
        self, rows: dict[str, Tensor], index: int, network_size: Tensor, image_size: Tensor
    ) -> tuple[dict[str, Tensor], Tensor, Tensor]:
        """One image's rows as they are decoded, their boxes in its original frame, and original pixels per network
        pixel: what the tasks' `to_image` takes."""
        mine = rows["image_index"] == index
        scale = image_size.flip(0).float() / network_size.flip(0).float()
        limit = image_size.flip(0).to(rows["boxes"].dtype)
        boxes = rows["boxes"][mine] * torch.cat([scale, scale])
        boxes = torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit]))
        keep = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        boxes = boxes[keep]
        decoded: dict[str, Tensor] = {}
        for key, value in rows.items():
            if key != "boxes" and key != "image_index":
                decoded[key] = value[mine][keep]
        return decoded, boxes, scale


@torch.jit.script_if_tracing
def normalised_batch(images: list[Tensor], mean: Tensor, std: Tensor, divisor: int) -> Tensor:
    """(B, 3, H, W) on the network's device: every image normalised, then padded with 0 to a common size that
    `divisor` divides."""
    height, width = 0, 0
    for image in images:
        height, width = max(height, image.shape[-2]), max(width, image.shape[-1])
    if divisor > 1:
        height = (height + divisor - 1) // divisor * divisor
        width = (width + divisor - 1) // divisor * divisor
    padded: list[Tensor] = []
    for image in images:
        pixels = (image.to(mean) - mean) / std
        padded.append(F.pad(pixels, [0, width - pixels.shape[-1], 0, height - pixels.shape[-2]]))
    return torch.stack(padded)


@torch.jit.script_if_tracing
def size_of(image: Tensor, reference: Tensor) -> Tensor:
    """(2,) int64 height and width of an image, on the device of `reference`."""
    return torch.tensor([image.shape[-2], image.shape[-1]], device=reference.device)


@torch.jit.script_if_tracing
def at_device_of(value: Tensor, reference: Tensor) -> Tensor:
    """`value` where `reference` is; a trace would write down the name of today's device instead."""
    return value.to(reference.device)


def given_rows(given: Sequence[GivenBoxes], network_sizes: Tensor, image_sizes: Tensor) -> dict[str, Tensor]:
    """Given boxes as the rows of detections that `RegionNetwork.describe` takes, with scores of one.

    Args:
        given: per image.
        network_sizes, image_sizes: (B, 2) int64 height and width, in the network frame and originally.
    """
    device = network_sizes.device
    scales = (network_sizes / image_sizes).flip(1).repeat(1, 2)
    counts = torch.tensor([len(boxes.classes) for boxes in given], device=device)
    image_index = torch.arange(len(given), device=device).repeat_interleave(counts)
    boxes = torch.cat([one.boxes for one in given]).to(device) * scales[image_index]
    classes = torch.cat([one.classes for one in given]).to(device)
    return {"boxes": boxes, "scores": torch.ones_like(boxes[:, 0]), "classes": classes, "image_index": image_index}


def _distinct(poolers: Iterable[RegionPooler]) -> tuple[nn.ModuleList, list[int]]:
    """The poolers without repetitions, and for each that was given its place among them."""
    distinct: list[RegionPooler] = []
    places: list[int] = []
    for pooler in poolers:
        equal = [index for index, other in enumerate(distinct) if other.settings == pooler.settings]
        if not equal:
            distinct.append(pooler)
        places.append(equal[0] if equal else len(distinct) - 1)
    return nn.ModuleList(distinct), places


def _has_detector(model: MultiTaskRCNN, names: Collection[str]) -> bool:
    return model.roi_heads is not None and model.roi_heads.detector.name in names


def chosen_tasks(model: MultiTaskRCNN, names: Collection[str] | None) -> list[str]:
    """These tasks of a network in slot order; None is all of them. ConfigError: see `InferenceNetwork`."""
    known = [task.name for task in model.tasks()]
    if names is None:
        return known
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ConfigError(
            f"export.tasks={list(names)}: expected some of the network's tasks, which are {', '.join(known)}"
        )
    on_boxes = [] if model.roi_heads is None else [name for name in model.roi_heads.tasks if name in names]
    if on_boxes and not _has_detector(model, names):
        raise ConfigError(
            f"export.tasks={list(names)}: {', '.join(on_boxes)} work on boxes; add {model.roi_heads.detector.name}"
        )
    return [name for name in known if name in names]
