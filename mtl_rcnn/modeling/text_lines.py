"""From scored strips to lines: what CTPN (arXiv 1609.03605, sections 3.2 and 3.3) does after the network.

The rules and thresholds are those of the authors' released code (tianzhi0549/CTPN, `tools/cfg.py`, `src/detectors.py`):
strips of high score, suppressed within each column, are chained to the neighbours that fit them best, and straight
lines are fitted to the chains' upper and lower ends. Differences:

* scores are not stretched to 0..1 within each image, so that a line's score does not depend on what else is seen;
* a line is a quadrilateral along the fitted edges, its sides at right angles to it, rather than an upright box;
* the ends are those that side refinement predicts, which the released network does not have;
* lines are suppressed by the overlap of these quadrilaterals; widths are not filtered beyond the number of strips.

All is plain tensor arithmetic that TorchScript compiles, without a loop over strips.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torchvision.ops import nms

SAMPLES = 32
"""Places along the common extent of two lines at which their overlap is measured."""


@torch.jit.script_if_tracing
def connect_strips(
    strips: Tensor,
    network_size: Tensor,
    width: float,
    refine: bool,
    score_thresh: float,
    nms_thresh: float,
    max_strips: int,
    max_gap: float,
    min_overlap: float,
    min_similarity: float,
    min_strips: int,
    min_aspect: float,
    line_score_thresh: float,
) -> tuple[Tensor, Tensor]:
    """Lines of one image: quadrilaterals (L, 8) x1, y1, ..., y4 clockwise from top left, and scores (L,), unordered.

    Args:
        strips: (A, 5): centre x, top, bottom, x of the side of the line, score in 0..1; network frame.
        network_size: (2,) height and width; what lies outside is padding.
        width: of the strips in pixels.
        refine: whether lines end at the predicted sides rather than with their last strips.
        score_thresh: strips have a larger score.
        nms_thresh: strips of one column that overlap a better one by more are suppressed.
        max_strips: the best so many go on.
        max_gap: neighbours in a line are at most so many pixels apart.
        min_overlap: their common height is at least this share of the smaller one's.
        min_similarity: and the smaller one's at least this share of the larger one's.
        min_strips: lines have at least so many.
        min_aspect: and a width of more than so many heights.
        line_score_thresh: and a larger mean score.
    """
    middle = (strips[:, 1] + strips[:, 2]) / 2
    size = network_size.to(strips.dtype)
    real = (strips[:, 0] < size[1]) & (middle > 0) & (middle < size[0]) & (strips[:, 2] > strips[:, 1])
    strips = strips[real & (strips[:, 4] > score_thresh) & torch.isfinite(strips).all(dim=1)]
    half = torch.full_like(strips[:, 0], width / 2)
    boxes = torch.stack([strips[:, 0] - half, strips[:, 1], strips[:, 0] + half, strips[:, 2]], dim=1)
    strips = strips[nms(boxes, strips[:, 4], nms_thresh)[:max_strips]]
    if strips.shape[0] == 0:
        return strips.new_zeros([0, 8]), strips.new_zeros([0])
    following = successors(strips, max_gap, min_overlap, min_similarity)
    line, number = chains(following)
    return lines_of_chains(strips, line, number, following, width, refine, min_strips, min_aspect, line_score_thresh)


def successors(strips: Tensor, max_gap: float, min_overlap: float, min_similarity: float) -> Tensor:
    """(N,) int64 the strip that continues each strip to the right, -1 for none.

    Of the strips that fit (see `connect_strips`) the best-scored one in the nearest column; it follows only if, seen
    from it, the first strip is the best to the left in the same way.
    """
    x, top, bottom, score = strips[:, 0], strips[:, 1], strips[:, 2], strips[:, 4]
    height = bottom - top
    gap = x[None, :] - x[:, None]
    smaller, larger = torch.minimum(height[None], height[:, None]), torch.maximum(height[None], height[:, None])
    shared = torch.minimum(bottom[None], bottom[:, None]) - torch.maximum(top[None], top[:, None])
    fits = (gap > 0) & (gap <= max_gap) & (shared >= min_overlap * smaller) & (smaller >= min_similarity * larger)
    distance = torch.where(fits, gap, torch.full_like(gap, float("inf")))
    none = torch.full_like(gap, -1.0)
    ahead = torch.where(fits & (distance <= distance.amin(dim=1, keepdim=True)), score[None, :], none)
    behind = torch.where(fits & (distance <= distance.amin(dim=0, keepdim=True)), score[:, None], none)
    found, following = ahead.max(dim=1)
    preceding = behind.max(dim=0)[1]
    place = torch.arange(x.shape[0], device=x.device)
    return torch.where((found >= 0) & (preceding[following] == place), following, torch.full_like(following, -1))


def chains(following: Tensor) -> tuple[Tensor, int]:
    """(N,) number of the chain that each strip belongs to, and how many chains there are, single strips too."""
    count = following.shape[0]
    linked = torch.nonzero(following >= 0).squeeze(1)
    first = torch.arange(count, device=following.device)
    starts = torch.ones_like(following)
    starts[following[linked]] = 0
    first[following[linked]] = linked
    jumps = 1
    while jumps < count:  # each round doubles how far back one sees
        first = first[first]
        jumps *= 2
    return (starts.cumsum(dim=0) - 1)[first], int(starts.sum())


def lines_of_chains(
    strips: Tensor,
    line: Tensor,
    number: int,
    following: Tensor,
    width: float,
    refine: bool,
    min_strips: int,
    min_aspect: float,
    line_score_thresh: float,
) -> tuple[Tensor, Tensor]:
    """Quadrilaterals and scores, as `connect_strips`, of `number` chains; `line` (N,) says which strip is whose."""
    totals = torch.zeros([number, 5], dtype=strips.dtype, device=strips.device).index_add(
        0, line, torch.cat([strips[:, :3], strips[:, 4:], torch.ones_like(strips[:, :1])], dim=1)
    )
    count = totals[:, 4]
    mean = totals[:, :4] / count[:, None]
    x, top, bottom, score = mean[:, 0], mean[:, 1], mean[:, 2], mean[:, 3]
    run = strips[:, 0] - x[line]
    sums = torch.zeros([number, 3], dtype=strips.dtype, device=strips.device).index_add(
        0, line, torch.stack([run * run, run * strips[:, 1], run * strips[:, 2]], dim=1)
    )
    spread = sums[:, 0].clamp(min=1e-6)  # of a single strip: no slope, as the other sums are 0
    starts = torch.ones_like(following)
    starts[following[following >= 0]] = 0
    left, right = torch.zeros_like(x), torch.zeros_like(x)
    if refine:
        end = torch.minimum(torch.maximum(strips[:, 3], strips[:, 0] - 2 * width), strips[:, 0] + 2 * width)
        left[line[starts > 0]], right[line[following < 0]] = end[starts > 0], end[following < 0]
    else:
        left[line[starts > 0]] = strips[starts > 0, 0] - width / 2
        right[line[following < 0]] = strips[following < 0, 0] + width / 2
    right = torch.maximum(right, left + 1)
    long = (count >= min_strips) & (right - left > min_aspect * (bottom - top))
    keep = long & (score > line_score_thresh)
    corners = quadrilaterals(left, right, x, top, sums[:, 1] / spread, bottom, sums[:, 2] / spread)
    return corners[keep], score[keep]


def quadrilaterals(
    left: Tensor, right: Tensor, x: Tensor, top: Tensor, top_slope: Tensor, bottom: Tensor, bottom_slope: Tensor
) -> Tensor:
    """(L, 8) corners clockwise from top left between two straight edges, with sides at right angles to their middle
    line.

    Args:
        left, right: (L,) x at which the sides cross the middle line.
        x: (L,) where the edges are at `top` and `bottom`, with slopes `top_slope` and `bottom_slope`.
    """
    slope, middle = (top_slope + bottom_slope) / 2, (top + bottom) / 2
    corners: list[Tensor] = []
    # Clockwise: along the upper edge, then back along the lower one.
    for place, start, inclination in (
        (left, top, top_slope),
        (right, top, top_slope),
        (right, bottom, bottom_slope),
        (left, bottom, bottom_slope),
    ):
        y = middle + slope * (place - x)
        rise = (start + inclination * (place - x) - y) / (1 + inclination * slope).clamp(min=0.1)
        corners.append(place - slope * rise)
        corners.append(y + rise)
    return torch.stack(corners, dim=1)


@torch.jit.script_if_tracing
def suppress_lines(polygons: Tensor, scores: Tensor, nms_thresh: float) -> tuple[Tensor, Tensor]:
    """Lines (L, 8) and scores (L,) without those that overlap a better one by an IoU of more than `nms_thresh`, best
    first."""
    order = scores.argsort(descending=True, stable=True)
    polygons, scores = polygons[order], scores[order]
    overlap = line_overlaps(polygons)
    gone = torch.zeros_like(scores, dtype=torch.bool)
    for index in range(polygons.shape[0]):
        if not bool(gone[index]):
            gone[index + 1 :] |= overlap[index, index + 1 :] > nms_thresh
    return polygons[~gone], scores[~gone]


def line_overlaps(polygons: Tensor, samples: int = SAMPLES) -> Tensor:
    """(L, L) IoU of lines (L, 8), as if their sides stood upright where they cross the middle line: the common area is
    the mean common height, at `samples` places, times the common extent."""
    x, y = polygons[:, 0::2], polygons[:, 1::2]
    left, right = (x[:, 0] + x[:, 3]) / 2, (x[:, 1] + x[:, 2]) / 2
    begin = torch.maximum(left[:, None], left[None, :])
    extent = (torch.minimum(right[:, None], right[None, :]) - begin).clamp(min=0)
    steps = (torch.arange(samples, dtype=x.dtype, device=x.device) + 0.5) / samples
    places = begin[:, :, None] + extent[:, :, None] * steps
    top = edge_at(x[:, 0], y[:, 0], x[:, 1], y[:, 1], places)
    bottom = edge_at(x[:, 3], y[:, 3], x[:, 2], y[:, 2], places)
    # The places of two lines are the same whichever comes first.
    high, low = torch.maximum(top, top.transpose(0, 1)), torch.minimum(bottom, bottom.transpose(0, 1))
    shared = (low - high).clamp(min=0).mean(dim=2) * extent
    area = shared.diagonal()
    return shared / (area[:, None] + area[None, :] - shared).clamp(min=1e-6)


def edge_at(x0: Tensor, y0: Tensor, x1: Tensor, y1: Tensor, places: Tensor) -> Tensor:
    """(L, M, S) y of L straight edges at x = `places` (L, M, S)."""
    slope = (y1 - y0) / (x1 - x0).clamp(min=1e-6)
    return y0[:, None, None] + slope[:, None, None] * (places - x0[:, None, None])
