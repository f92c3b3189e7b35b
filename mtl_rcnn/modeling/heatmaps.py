"""From a heatmap per keypoint to its highest point."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.jit.script_if_tracing
def highest_points(heatmaps: Tensor, boxes: Tensor) -> Tensor:
    """(R, K, 3) x, y of the highest point of every heatmap and its probability.

    A box's maps are enlarged to its size by bicubic interpolation, and the probability is that of a softmax over the
    map as it was. The numbers are those of Detectron2's `heatmaps_to_keypoints`, which takes the exponential of every
    enlarged pixel; the highest point's is 1 by construction, so that here only the small map's are needed.

    Args:
        heatmaps: (R, K, S, S) logits.
        boxes: (R, 4) XYXY pixels, the frame of x and y.
    """
    points = torch.zeros_like(heatmaps[:, :, 0, :3])
    sizes = (boxes[:, 2:] - boxes[:, :2]).clamp(min=1)
    whole = sizes.ceil()
    shrink = sizes / whole
    for index in range(boxes.shape[0]):
        width, height = int(whole[index, 0].item()), int(whole[index, 1].item())
        maps = heatmaps[index : index + 1]
        enlarged = F.interpolate(maps, size=[height, width], mode="bicubic", align_corners=False).flatten(2)[0]
        place = enlarged.argmax(1)
        peak = enlarged.gather(1, place[:, None])
        x = place % width
        y = (place - x) // width
        points[index, :, 0] = (x.float() + 0.5) * shrink[index, 0] + boxes[index, 0]
        points[index, :, 1] = (y.float() + 0.5) * shrink[index, 1] + boxes[index, 1]
        points[index, :, 2] = 1.0 / (maps[0] - peak[:, :, None]).exp().sum((1, 2))
    return points
