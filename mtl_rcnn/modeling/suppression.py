"""From scored boxes to few of them, per image: proposals and detections. Detectron2's steps, on plain tensors."""

from __future__ import annotations

import torch
from detectron2.layers import batched_nms
from torch import Tensor


@torch.jit.script_if_tracing
def grid_anchors(level: Tensor, cells: Tensor, stride: int, offset: float) -> Tensor:
    """(H * W * A, 4) anchors of one pyramid level (B, C, H, W): `cells` (A, 4) moved to every position, in pixels of
    the network frame."""
    start = offset * stride
    x = torch.arange(start, level.shape[-1] * stride, float(stride), dtype=torch.float32, device=cells.device)
    y = torch.arange(start, level.shape[-2] * stride, float(stride), dtype=torch.float32, device=cells.device)
    y, x = torch.meshgrid([y, x], indexing="ij")
    shifts = torch.stack([x.flatten(), y.flatten(), x.flatten(), y.flatten()], dim=1)
    return (shifts[:, None] + cells[None]).reshape(-1, 4)


@torch.jit.script_if_tracing
def top_proposals(
    boxes: list[Tensor],
    logits: list[Tensor],
    network_sizes: Tensor,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
) -> list[Tensor]:
    """The best boxes (P_i, 4) of every image: the first of every level by objectness, clipped, not empty, without
    overlap within a level (Faster R-CNN on a pyramid).

    Args:
        boxes: (B, R, 4) per level, XYXY pixels of the network frame.
        logits: (B, R) per level.
        network_sizes: (B, 2) height and width of every image.
        nms_thresh: larger overlaps are suppressed.
        pre_nms_topk: boxes kept of every level before that.
        post_nms_topk: boxes kept of every image.
        min_box_size: smaller boxes are dropped.
    """
    chosen: list[Tensor] = []
    scores: list[Tensor] = []
    levels: list[Tensor] = []
    for index, (level, logit) in enumerate(zip(boxes, logits)):
        ordered, order = logit.sort(descending=True, dim=1)
        order = order[:, :pre_nms_topk]
        chosen.append(level.gather(1, order[:, :, None].expand(-1, -1, 4)))
        scores.append(ordered[:, :pre_nms_topk])
        levels.append(torch.full_like(order, index))
    all_boxes, all_scores, all_levels = torch.cat(chosen, dim=1), torch.cat(scores, dim=1), torch.cat(levels, dim=1)
    proposals: list[Tensor] = []
    for image in range(network_sizes.shape[0]):
        box, score, level = clipped(all_boxes[image], network_sizes[image]), all_scores[image], all_levels[image]
        large = (box[:, 2] - box[:, 0] > min_box_size) & (box[:, 3] - box[:, 1] > min_box_size)
        rows = torch.nonzero(large & torch.isfinite(all_boxes[image]).all(dim=1) & torch.isfinite(score)).squeeze(1)
        box, score, level = box[rows], score[rows], level[rows]
        proposals.append(box[batched_nms(box, score, level, nms_thresh)[:post_nms_topk]])
    return proposals


@torch.jit.script_if_tracing
def top_detections(
    boxes: Tensor,
    scores: Tensor,
    proposals: list[Tensor],
    network_sizes: Tensor,
    score_thresh: float,
    nms_thresh: float,
    detections_per_image: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Detections of every image, best first: boxes (N, 4), scores (N,), classes (N,), image_index (N,).

    Args:
        boxes: (R, C * 4), or (R, 4) for boxes without a class: XYXY pixels of the network frame.
        scores: (R, C + 1) probabilities, the last column background.
        proposals: (P_i, 4) per image: which of the R rows are an image's.
        network_sizes: (B, 2) height and width of every image.
        score_thresh: detections have a larger score.
        nms_thresh: larger overlaps within a class are suppressed.
        detections_per_image: at most so many.
    """
    found: list[list[Tensor]] = [[], [], [], []]
    start = 0
    for image, proposed in enumerate(proposals):
        end = start + proposed.shape[0]
        box, score = boxes[start:end], scores[start:end]
        start = end
        finite = torch.nonzero(torch.isfinite(box).all(dim=1) & torch.isfinite(score).all(dim=1)).squeeze(1)
        score = score[finite, :-1]
        box = clipped(box[finite].reshape(finite.shape[0], boxes.shape[1] // 4, 4), network_sizes[image])
        sure = torch.nonzero(score > score_thresh)
        box = box.expand(-1, score.shape[1], -1)[sure[:, 0], sure[:, 1]]
        score = score[sure[:, 0], sure[:, 1]]
        keep = batched_nms(box, score, sure[:, 1], nms_thresh)[:detections_per_image]
        found[0].append(box[keep])
        found[1].append(score[keep])
        found[2].append(sure[keep, 1])
        found[3].append(torch.full_like(keep, image))
    return torch.cat(found[0]), torch.cat(found[1]), torch.cat(found[2]), torch.cat(found[3])


def clipped(boxes: Tensor, size: Tensor) -> Tensor:
    """Boxes (..., 4) clipped to an image of `size` (2,) height and width."""
    limit = size.flip(0).to(boxes.dtype)
    return torch.minimum(boxes.clamp(min=0), torch.cat([limit, limit]))
