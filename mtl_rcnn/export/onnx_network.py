"""The inference network with outputs of fixed number, as ONNX can express it: any batch, any size."""

from __future__ import annotations

from collections.abc import Collection

import torch
from torch import Tensor, nn
from torchvision.ops import roi_align

from mtl_rcnn.errors import ExportError
from mtl_rcnn.modeling.fixed_size import NOTHING, best, rows
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.pooling import RegionPooler, level_of
from mtl_rcnn.modeling.slots import Features, full_precision

COMMON = ("count", "boxes", "scores", "classes")


class FixedNetwork(nn.Module):
    """Detections of a padded batch, K rows per image, best first; rows beyond `count` hold nothing.

    Args:
        model: the network.
        tasks: names of the tasks to keep; None keeps all.

    Attributes:
        names: of the outputs; complete after the first run.

    Raises:
        ExportError: the network has no detector, or a task on whole images.
    """

    def __init__(self, model: MultiTaskRCNN, tasks: Collection[str] | None = None) -> None:
        super().__init__()
        self.network = InferenceNetwork(model, tasks)
        if self.network.regions is None or len(self.network.image_tasks) > 0:
            raise ExportError(_refusal(self.network))
        self.names = list(COMMON)

    def forward(self, images: Tensor, network_sizes: Tensor, sizes: Tensor) -> tuple[Tensor, ...]:
        """count (B,), boxes (B, K, 4) in the original frame, scores (B, K), classes (B, K), then every RoI task's
        grids (B, K, ...).

        Args:
            images: (B, 3, H, W) values 0..255, every image in the upper left corner, 0 elsewhere; H and W are
                multiples of the trunk's largest stride.
            network_sizes: (B, 2) int64 height and width of each without padding.
            sizes: (B, 2) int64 original height and width.
        """
        net = self.network
        features = net.backbone(self._normalised(images, network_sizes))
        regions = net.regions
        boxes, found = regions.detector.fixed_proposals(features, network_sizes)
        raw = regions.detector(pool(regions.detector_pooler, features, boxes))
        boxes, scores, classes = regions.detector.fixed_decode(raw, boxes, found, network_sizes)
        boxes, scores, classes, shown = _to_image(boxes, scores, classes, network_sizes, sizes)
        outputs = [(scores > NOTHING).sum(dim=1), shown, scores.clamp(min=0), classes]
        self.names = list(COMMON)
        pooled = [pool(pooler, features, boxes) for pooler in regions.poolers]
        for index, task in enumerate(regions.tasks):
            grids = task.grids(task(pooled[regions.pooler_of[index]]), classes.reshape(-1))
            self.names += list(grids)
            outputs += [grid.reshape(*classes.shape, *grid.shape[1:]) for grid in grids.values()]
        return tuple(outputs)

    def _normalised(self, images: Tensor, network_sizes: Tensor) -> Tensor:
        """Padding is 0 after normalising, as the network knows it."""
        pixels = (images.float() - self.network.pixel_mean) / self.network.pixel_std
        y = torch.arange(images.shape[2], device=images.device)[None, :] < network_sizes[:, :1]
        x = torch.arange(images.shape[3], device=images.device)[None, :] < network_sizes[:, 1:]
        return pixels * (y[:, None, :, None] & x[:, None, None, :])


def _refusal(network: InferenceNetwork) -> str:
    """Why the network cannot be written, and what can."""
    whole = [task.name for task in network.image_tasks]
    reason = f"export.method=onnx: {', '.join(whole)}: tasks on whole images have no fixed form so far"
    others = [name for name in network.names if name not in whole]
    advice = f"leave them out (export.tasks=[{','.join(others)}]), or " if others else ""
    return f"{reason}; {advice}choose export.method=trace or script"


def pool(pooler: RegionPooler, features: Features, boxes: Tensor) -> Tensor:
    """(B * K, C, S, S) features of boxes (B, K, 4), as the pooler's own, without a loop that depends on data."""
    index = torch.arange(boxes.shape[0], device=boxes.device)[:, None, None].expand(-1, boxes.shape[1], 1)
    rois = torch.cat([index.to(boxes), boxes], dim=2).reshape(-1, 5)
    levels = [full_precision(features[name]) for name in pooler.in_features]
    own = level_of(rois, pooler.min_level, pooler.max_level, pooler.box_size, pooler.box_level)
    pooled = torch.zeros_like(rois[:, :1, None, None]).repeat(1, levels[0].shape[1], pooler.side, pooler.side)
    for number, level in enumerate(levels):
        mine = torch.nonzero(own == number).squeeze(1)
        part = roi_align(level, rois[mine], pooler.side, pooler.scales[number], pooler.ratio, pooler.aligned)
        pooled = pooled.index_put((mine,), part)
    return pooled


def _to_image(
    boxes: Tensor, scores: Tensor, classes: Tensor, network_sizes: Tensor, sizes: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Boxes in the network frame, scores, classes, boxes in the original frame; those of which nothing is left there
    move behind the others."""
    scale = (sizes.flip(1).float() / network_sizes.flip(1).float()).repeat(1, 2)[:, None]
    shown = torch.minimum((boxes * scale).clamp(min=0), sizes.flip(1).float().repeat(1, 2)[:, None])
    there = (shown[..., 2:] > shown[..., :2]).all(dim=2) & (scores > NOTHING)
    scores = torch.where(there, scores, torch.full_like(scores, NOTHING))
    scores, order = best(scores, int(scores.shape[1]))
    there = scores > NOTHING
    boxes, shown = rows(boxes, order) * there[..., None], rows(shown, order) * there[..., None]
    return boxes, scores, classes.gather(1, order) * there, shown
