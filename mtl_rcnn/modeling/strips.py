"""Narrow anchors that stand side by side in the columns of a map, and what lines of an image make of them.

CTPN (arXiv 1609.03605, section 3.1): every position of the map carries k anchors, as wide as the map's stride and of k
heights; a line is a row of such strips. A line's upper and lower edge are taken at the centre of each column, so that
the strips of an oriented line lie on its edges, and a straight line through their ends gives the edges back.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

MAX_STRETCH = math.log(1000.0 / 16)
"""Largest log(h / h_a) that is decoded, as Detectron2's for boxes: an untrained network gives no infinite strip."""


@dataclass(frozen=True)
class StripRules:
    """Which anchors are drawn from, and which learn coordinates (CTPN, section 3.4).

    Attributes:
        positive_iou: anchors that overlap a strip of a line by more are positive; so is the best of every strip.
        negative_iou: those that overlap every strip by less are negative.
        regression_iou: anchors that overlap a strip by more, and all positive ones, learn vertical coordinates.
        side_distance: those of them at most so many pixels from an end of their line learn where it is.
    """

    positive_iou: float = 0.7
    negative_iou: float = 0.5
    regression_iou: float = 0.5
    side_distance: float = 32.0


@dataclass
class StripLabels:
    """What A = H * W * k anchors of an image learn, in the order of `grid_strips`.

    Attributes:
        labels: (A,) int64: 1 positive, 0 negative, -1 neither.
        valid: (A,) bool, which learn vertical coordinates; the others' are placeholders.
        vertical: (A, 2) v_c and v_h.
        beside: (A,) bool, which learn the side of their line.
        side: (A,) o.
    """

    labels: Tensor
    valid: Tensor
    vertical: Tensor
    beside: Tensor
    side: Tensor


@torch.jit.script_if_tracing
def grid_strips(raw: Tensor, heights: Tensor, stride: int) -> Tensor:
    """(H * W * k, 3) anchors of a map: centre x, centre y and height in pixels of the network frame.

    Args:
        raw: (B, H, W, ...).
        heights: (k,) pixels.
        stride: pixels per position; anchors are as wide.
    """
    x = (torch.arange(raw.shape[2], device=heights.device, dtype=torch.float32) + 0.5) * stride
    y = (torch.arange(raw.shape[1], device=heights.device, dtype=torch.float32) + 0.5) * stride
    y, x, height = torch.meshgrid([y, x, heights], indexing="ij")
    return torch.stack([x.flatten(), y.flatten(), height.flatten()], dim=1)


def encode_vertical(anchors: Tensor, top: Tensor, bottom: Tensor) -> Tensor:
    """(A, 2): v_c = (c_y - c_y^a) / h^a and v_h = log(h / h^a) (CTPN, equation 1).

    Args:
        anchors: (A, 3), see `grid_strips`.
        top, bottom: (A,) pixels, top < bottom.
    """
    centre, height = (top + bottom) / 2, bottom - top
    return torch.stack([(centre - anchors[:, 1]) / anchors[:, 2], torch.log(height / anchors[:, 2])], dim=1)


def decode_vertical(anchors: Tensor, vertical: Tensor, max_stretch: float = MAX_STRETCH) -> tuple[Tensor, Tensor]:
    """Inverse of `encode_vertical`: top (..., A) and bottom (..., A) of coordinates (..., A, 2)."""
    centre = vertical[..., 0] * anchors[:, 2] + anchors[:, 1]
    half = vertical[..., 1].clamp(max=max_stretch).exp() * anchors[:, 2] / 2
    return centre - half, centre + half


@torch.no_grad()
def label_strips(
    anchors: Tensor,
    shape: tuple[int, int, int],
    quads: Tensor,
    ignored: Tensor,
    image_size: tuple[int, int],
    stride: int,
    rules: StripRules,
) -> StripLabels:
    """Labels of one image's anchors.

    A column belongs to a line if its centre lies between the line's ends (of a line between two centres: the nearest
    one). Anchors that overlap an ignored line, or any line in columns that it merely touches, are neither positive nor
    negative; nor are anchors with their centre in the padding.

    Args:
        anchors: (A, 3), see `grid_strips`.
        shape: H, W, k with H * W * k = A.
        quads: (L, 4, 2) lines as x, y of top left, top right, bottom right, bottom left, network frame.
        ignored: (L,) bool: lines that are neither text nor background.
        image_size: height and width without padding.
        stride: width of the anchors in pixels.
        rules: thresholds.
    """
    count = len(anchors)
    padding = (anchors[:, 0] >= image_size[1]) | (anchors[:, 1] >= image_size[0])
    if len(quads) == 0:
        zeros, nothing = anchors.new_zeros(count), torch.zeros_like(padding)
        return StripLabels(-padding.long(), nothing, zeros[:, None].repeat(1, 2), nothing, zeros)
    line = _Lines.at_columns(quads, anchors.view(*shape, 3)[0, :, 0, 0], image_size[1], stride)
    own = line.own & ~ignored[:, None]
    overlap, inside = _overlaps(anchors.view(*shape, 3), line)  # (L, H, W, k) each
    spared = (line.touched & ~own)[:, None, :, None] & ((overlap >= rules.negative_iou) | (inside > 0.5))
    overlap = overlap * own[:, None, :, None]
    best, match = overlap.flatten(1).max(dim=0)
    highest = overlap.amax(dim=(1, 3), keepdim=True)
    best_of_strip = ((overlap == highest) & (highest > 0)).any(dim=0).flatten()
    positive = ((best > rules.positive_iou) | best_of_strip) & ~padding
    labels = torch.where(positive, 1, torch.where(best < rules.negative_iou, 0, -1))
    labels[~positive & (padding | spared.any(dim=0).flatten())] = -1
    valid = positive | ((best > rules.regression_iou) & ~padding)
    column = torch.arange(shape[1], device=anchors.device)[None, :, None].expand(shape).flatten()
    vertical = encode_vertical(anchors, line.top[match, column], line.bottom[match, column])
    away = torch.stack([line.left[match], line.right[match]]) - anchors[:, 0]
    nearest = away.gather(0, away.abs().argmin(dim=0)[None])[0]
    beside = valid & (nearest.abs() <= rules.side_distance)
    return StripLabels(labels, valid, vertical, beside, nearest / stride)


@dataclass
class _Lines:
    """L lines at W columns: `left`, `right` (L,) ends; `top`, `bottom` (L, W) edges at the columns' centres; `own` and
    `touched` (L, W) bool."""

    left: Tensor
    right: Tensor
    top: Tensor
    bottom: Tensor
    own: Tensor
    touched: Tensor

    @staticmethod
    def at_columns(quads: Tensor, centres: Tensor, image_width: int, stride: int) -> _Lines:
        left, right = (end.clamp(0, image_width) for end in ends(quads))
        top, bottom = (_edge(quads[:, first], quads[:, second], centres) for first, second in ((0, 1), (3, 2)))
        bottom = torch.maximum(bottom, top + 1)  # of a degenerate line, or far beyond the ends of a short one
        own = (centres >= left[:, None]) & (centres <= right[:, None])
        nearest = (centres - (left + right)[:, None] / 2).abs().argmin(dim=1)
        seen = right > left
        own[~own.any(dim=1) & seen, nearest[~own.any(dim=1) & seen]] = True
        x = quads[..., 0]
        reach = x.amin(dim=1)[:, None] < centres + stride / 2, x.amax(dim=1)[:, None] > centres - stride / 2
        return _Lines(left, right, top, bottom, own, reach[0] & reach[1])


def ends(quads: Tensor) -> tuple[Tensor, Tensor]:
    """(L,) x of the middle of the left and of the right side of quadrilaterals (L, 4, 2)."""
    x = quads[..., 0]
    return (x[:, 0] + x[:, 3]) / 2, (x[:, 1] + x[:, 2]) / 2


def _edge(start: Tensor, end: Tensor, x: Tensor) -> Tensor:
    """(L, W) y at x (W,) of the straight lines through points (L, 2); level where these stand above each other."""
    run = end[:, 0] - start[:, 0]
    slope = torch.where(run > 1e-3, (end[:, 1] - start[:, 1]) / run.clamp(min=1e-3), torch.zeros_like(run))
    middle = (start + end) / 2
    return middle[:, 1:] + slope[:, None] * (x[None] - middle[:, :1])


def _overlaps(anchors: Tensor, line: _Lines) -> tuple[Tensor, Tensor]:
    """(L, H, W, k) IoU of anchors (H, W, k, 3) with the lines' strips of their columns, and the share of the anchors
    that lies in them. All are equally wide, so that heights suffice."""
    low, high = anchors[..., 1] - anchors[..., 2] / 2, anchors[..., 1] + anchors[..., 2] / 2
    top, bottom = line.top[:, None, :, None], line.bottom[:, None, :, None]
    shared = (torch.minimum(bottom, high) - torch.maximum(top, low)).clamp(min=0)
    return shared / (bottom - top + anchors[..., 2] - shared), shared / anchors[..., 2]
