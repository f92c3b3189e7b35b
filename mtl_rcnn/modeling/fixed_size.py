"""Proposals and detections of fixed number, for formats whose tensors cannot have a different length per image.

Each image has K rows, the best first, and rows beyond its own number are 0. No loop runs over images, so that the
batch stays free in an exported graph. The steps are those of `suppression`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchvision.ops import nms

NOTHING = -1e30
"""Score of a row that holds nothing."""


def fixed_proposals(
    boxes: list[Tensor],
    logits: list[Tensor],
    network_sizes: Tensor,
    nms_thresh: float,
    pre_nms_topk: int,
    post_nms_topk: int,
    min_box_size: float,
) -> tuple[Tensor, Tensor]:
    """(B, P, 4) boxes and (B, P) whether a row holds one; arguments as of `suppression.top_proposals`."""
    limit = _limit(network_sizes)[:, None]
    chosen, scores = [], []
    for box, logit in zip(boxes, logits):
        score, order = best(logit, pre_nms_topk)
        box = torch.minimum(rows(box, order).clamp(min=0), limit)
        sides = box[..., 2:] - box[..., :2]
        score = torch.where((sides > min_box_size).all(dim=2), score, torch.full_like(score, NOTHING))
        chosen.append(box)
        scores.append(suppressed(box, score, nms_thresh))
    score, order = best(torch.cat(scores, dim=1), post_nms_topk)
    found = score > NOTHING
    return rows(torch.cat(chosen, dim=1), order) * found[..., None], found


def fixed_detections(
    boxes: Tensor,
    scores: Tensor,
    found: Tensor,
    network_sizes: Tensor,
    score_thresh: float,
    nms_thresh: float,
    detections_per_image: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Detections of every image: boxes (B, K, 4), scores (B, K), `NOTHING` where there is none, classes (B, K).

    Args:
        boxes: (B, P, C, 4) pixels of the network frame.
        scores: (B, P, C) probabilities.
        found: (B, P) which proposals there are.
        network_sizes, score_thresh, nms_thresh, detections_per_image: as of `suppression.top_detections`.
    """
    images, proposals, classes = scores.shape
    boxes = torch.minimum(boxes.clamp(min=0), _limit(network_sizes)[:, None, None])
    scores = torch.where((scores > score_thresh) & found[..., None], scores, torch.full_like(scores, NOTHING))
    boxes = boxes.permute(0, 2, 1, 3).reshape(images * classes, proposals, 4)
    kept = suppressed(boxes, scores.permute(0, 2, 1).reshape(images * classes, proposals), nms_thresh)
    score, order = best(kept.reshape(images, classes * proposals), detections_per_image)
    box = rows(boxes.reshape(images, classes * proposals, 4), order) * (score > NOTHING)[..., None]
    return box, score, torch.where(score > NOTHING, torch.div(order, proposals, rounding_mode="floor"), 0)


def best(scores: Tensor, number: int) -> tuple[Tensor, Tensor]:
    """The highest scores (B, number) of (B, R), and their columns; `NOTHING` and column 0 where R is smaller."""
    padded = torch.cat([scores, torch.full_like(scores[:, :1], NOTHING).expand(-1, number)], dim=1)
    values, order = padded.topk(number, dim=1)
    return values, torch.where(order < scores.shape[1], order, 0)


def rows(values: Tensor, order: Tensor) -> Tensor:
    """(B, K, 4) rows of (B, R, 4)."""
    return values.gather(1, order[..., None].expand(-1, -1, 4))


def suppressed(boxes: Tensor, scores: Tensor, nms_thresh: float) -> Tensor:
    """Scores (G, N) of G groups of boxes (G, N, 4), `NOTHING` where a better one of the group overlaps too much."""
    selected = _Suppression.apply(boxes, scores[:, None], nms_thresh)
    kept = torch.zeros_like(scores).reshape(-1)
    kept = kept.scatter(0, selected[:, 0] * scores.shape[1] + selected[:, 2], torch.ones_like(selected[:, 0]).to(kept))
    return torch.where(kept.reshape(scores.shape) > 0, scores, torch.full_like(scores, NOTHING))


class _Suppression(torch.autograd.Function):
    """ONNX's NonMaxSuppression: selected (group, 0, row) as (M, 3) int64."""

    @staticmethod
    def forward(ctx: Any, boxes: Tensor, scores: Tensor, nms_thresh: float) -> Tensor:
        found = []
        for group in range(boxes.shape[0]):
            there = torch.nonzero(scores[group, 0] > NOTHING).squeeze(1)
            kept = there[nms(boxes[group][there], scores[group, 0][there], nms_thresh)]
            found.append(torch.stack([torch.full_like(kept, group), torch.zeros_like(kept), kept], dim=1))
        return torch.cat(found)

    @staticmethod
    def symbolic(g: Any, boxes: Any, scores: Any, nms_thresh: float) -> Any:
        limits = (torch.tensor([2**31 - 1]), torch.tensor([nms_thresh]), torch.tensor([NOTHING]))
        return g.op("NonMaxSuppression", boxes, scores, *(g.op("Constant", value_t=limit) for limit in limits))


def _limit(network_sizes: Tensor) -> Tensor:
    """(B, 4): width, height, width, height."""
    return network_sizes.flip(1).float().repeat(1, 2)
