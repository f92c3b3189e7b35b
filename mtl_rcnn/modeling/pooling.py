"""RoIAlign over a pyramid on plain tensors: what Detectron2's `ROIPooler` computes, in a form TorchScript takes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from detectron2.modeling.poolers import ROIPooler
from torch import Tensor, nn
from torchvision.ops import roi_align

from mtl_rcnn.modeling.slots import Features, full_precision


class RegionPooler(nn.Module):
    """A `ROIPooler` at test time; it has no parameters.

    Args:
        pooler: RoIAlign on every level, square output.
        in_features: names of its pyramid levels.
    """

    def __init__(self, pooler: ROIPooler, in_features: Sequence[str]) -> None:
        super().__init__()
        first = pooler.level_poolers[0]
        self.in_features = list(in_features)
        self.scales = [float(level.spatial_scale) for level in pooler.level_poolers]
        self.side, self.ratio, self.aligned = int(pooler.output_size[0]), int(first.sampling_ratio), bool(first.aligned)
        self.min_level, self.max_level = int(pooler.min_level), int(pooler.max_level)
        self.box_size, self.box_level = int(pooler.canonical_box_size), int(pooler.canonical_level)
        ways = (self.side, self.ratio, int(self.aligned), self.min_level, self.max_level, self.box_size, self.box_level)
        self.settings = ",".join(map(str, (*self.in_features, *self.scales, *ways)))
        """Equal for poolers that give equal features; text, which TorchScript can keep."""

    def forward(self, features: Features, boxes: list[Tensor]) -> Tensor:
        """(R, C, S, S) features of the boxes (R_i, 4) of B images, XYXY pixels of the network frame, in float32."""
        levels = [full_precision(features[name]) for name in self.in_features]
        rois = with_image_index(boxes)
        level = level_of(rois, self.min_level, self.max_level, self.box_size, self.box_level)
        return pool_levels(levels, rois, level, self.scales, self.side, self.ratio, self.aligned)


@torch.jit.script_if_tracing
def with_image_index(boxes: list[Tensor]) -> Tensor:
    """(R, 5): the image's index before each box."""
    return torch.cat([torch.cat([torch.full_like(b[:, :1], i), b], dim=1) for i, b in enumerate(boxes)])


def level_of(rois: Tensor, min_level: int, max_level: int, box_size: int, box_level: int) -> Tensor:
    """(R,) index of the pyramid level that a box of its size is pooled from (arXiv 1612.03144, equation 1)."""
    side = torch.sqrt((rois[:, 3] - rois[:, 1]) * (rois[:, 4] - rois[:, 2]))
    level = torch.floor(box_level + torch.log2(side / box_size + 1e-8))
    return level.clamp(min=min_level, max=max_level).to(torch.int64) - min_level


@torch.jit.script_if_tracing
def pool_levels(
    features: list[Tensor], rois: Tensor, level: Tensor, scales: list[float], side: int, ratio: int, aligned: bool
) -> Tensor:
    """RoIAlign of every box on its own level."""
    pooled = torch.zeros([rois.shape[0], features[0].shape[1], side, side], dtype=features[0].dtype, device=rois.device)
    for index, feature in enumerate(features):
        rows = torch.nonzero(level == index).squeeze(1)
        pooled.index_put_(
            (rows,), roi_align(feature, rois[rows].to(feature.dtype), [side, side], scales[index], ratio, aligned)
        )
    return pooled
