"""Lines made of strips by hand: two lines, an oriented one, gaps, ends, filters, suppression."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from mtl_rcnn.modeling.text_lines import connect_strips, line_overlaps, suppress_lines

RULES = {
    "width": 16.0,
    "refine": False,
    "score_thresh": 0.7,
    "nms_thresh": 0.3,
    "max_strips": 1000,
    "max_gap": 50.0,
    "min_overlap": 0.7,
    "min_similarity": 0.7,
    "min_strips": 2,
    "min_aspect": 1.2,
    "line_score_thresh": 0.7,
}
SIZE = torch.tensor([200, 400])


def strip(column: int, top: float, bottom: float, score: float = 0.9, side: float | None = None) -> list[float]:
    x = (column + 0.5) * 16
    return [x, top, bottom, x if side is None else side, score]


def connected(strips: list[list[float]], **rules: Any) -> tuple[np.ndarray, list[float]]:
    """Polygons in the order of their upper left corners, and scores."""
    polygons, scores = connect_strips(torch.tensor(strips).reshape(-1, 5), SIZE, *{**RULES, **rules}.values())
    order = sorted(range(len(polygons)), key=lambda index: (polygons[index, 1].item(), polygons[index, 0].item()))
    return polygons[order].numpy(), scores[order].tolist()


def test_two_lines_above_each_other() -> None:
    upper = [strip(column, 20, 40, 0.8 + 0.02 * column) for column in range(2, 7)]
    lower = [strip(column, 60, 90) for column in range(1, 5)]
    polygons, scores = connected(upper + lower)
    np.testing.assert_allclose(polygons[0], [32, 20, 112, 20, 112, 40, 32, 40], atol=1e-3)
    np.testing.assert_allclose(polygons[1], [16, 60, 80, 60, 80, 90, 16, 90], atol=1e-3)
    assert scores == pytest.approx([0.88, 0.9])


def test_nothing_gives_nothing() -> None:
    polygons, scores = connected([])
    assert polygons.shape == (0, 8)
    assert scores == []
    assert connected([strip(1, 20, 40, 0.6), strip(2, 20, 40, 0.65)])[1] == []


@pytest.mark.parametrize("slope", [0.25, -0.3])
def test_an_oriented_line_is_a_rectangle_along_its_edges(slope: float) -> None:
    strips = [
        strip(column, 100 + slope * (column + 0.5) * 16, 120 + slope * (column + 0.5) * 16) for column in range(9)
    ]
    ((polygon,), _) = connected(strips)
    corners = polygon.reshape(4, 2)
    edges = np.roll(corners, -1, axis=0) - corners
    for edge in (edges[0], -edges[2]):
        assert edge[1] / edge[0] == pytest.approx(slope, abs=1e-4)
    assert edges[0] @ edges[1] == pytest.approx(0, abs=0.1)
    assert corners[:, 1] - slope * corners[:, 0] == pytest.approx([100, 100, 120, 120], abs=1e-2)
    middle = (corners[0] + corners[3]) / 2, (corners[1] + corners[2]) / 2
    assert [middle[0][0], middle[1][0]] == pytest.approx([0, 144], abs=1e-3)


def test_least_squares_not_the_first_and_the_last_strip() -> None:
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 2, (12, 2))
    ((polygon,), _) = connected([strip(c, 50 + noise[c, 0], 75 + noise[c, 1]) for c in range(12)])
    x = (np.arange(12) + 0.5) * 16
    top, bottom = np.polyfit(x, 50 + noise[:, 0], 1), np.polyfit(x, 75 + noise[:, 1], 1)
    corners = polygon.reshape(4, 2)
    np.testing.assert_allclose(np.polyval(top, corners[:2, 0]), corners[:2, 1], atol=1e-3)
    np.testing.assert_allclose(np.polyval(bottom, corners[2:, 0]), corners[2:, 1], atol=1e-3)


@pytest.mark.parametrize(("gap", "number"), [(3, 1), (4, 2)])
def test_a_gap_of_up_to_50_pixels_is_bridged(gap: int, number: int) -> None:
    strips = [strip(column, 20, 40) for column in (1, 2, 3, 3 + gap, 4 + gap, 5 + gap)]
    assert len(connected(strips)[0]) == number


def test_neighbours_have_a_common_height_and_like_sizes() -> None:
    assert len(connected([strip(c, 20, 40) for c in (1, 2)] + [strip(c, 27, 47) for c in (3, 4)])[0]) == 2
    assert len(connected([strip(c, 20, 40) for c in (1, 2)] + [strip(c, 25, 45) for c in (3, 4)])[0]) == 1
    grown = [strip(c, 20, 40) for c in (1, 2)] + [strip(c, 15, 45) for c in (3, 4, 5)]
    assert len(connected(grown)[0]) == 2  # 20 / 30 is less than 0.7


def test_the_best_of_several_followers_is_taken_if_it_agrees() -> None:
    # Two strips in column 2 fit the one in column 1; the better one goes on. The other is alone and no line.
    strips = [strip(1, 20, 40), strip(2, 15, 34, 0.8), strip(2, 25.5, 45, 0.95), strip(3, 25.5, 45)]
    ((polygon,), scores) = connected(strips, nms_thresh=0.6)
    assert scores == pytest.approx([(0.9 + 0.95 + 0.9) / 3])
    assert polygon[[2, 4]].mean() == pytest.approx(64, abs=1e-2)


def test_ends_are_refined() -> None:
    strips = [strip(2, 20, 40, side=37.5), strip(3, 20, 40), strip(4, 20, 40, side=71.0)]
    ((polygon,), _) = connected(strips, refine=True)
    np.testing.assert_allclose(polygon, [37.5, 20, 71, 20, 71, 40, 37.5, 40], atol=1e-3)
    strips[0][3] = -500.0  # no end is further than two strips away
    assert connected(strips, refine=True)[0][0][0] == 40 - 32


def test_filters() -> None:
    line = [strip(c, 20, 40) for c in (1, 2, 3)]
    assert len(connected(line, min_strips=4)[0]) == 0
    assert len(connected([strip(1, 20, 40)], min_strips=1, min_aspect=0.5)[0]) == 1
    assert len(connected(line, min_aspect=2.5)[0]) == 0
    assert len(connected(line, line_score_thresh=0.95)[0]) == 0
    assert len(connected([strip(c, 20, 40) for c in (24, 25, 26)])[0]) == 0  # in the padding but for one
    assert len(connected([strip(c, 190, 220) for c in (1, 2, 3)])[0]) == 0  # below the image
    assert len(connected([[float("nan")] * 4 + [0.9], *line])[0]) == 1


def test_strips_are_suppressed_within_their_column() -> None:
    strips = [strip(c, 20, 40) for c in (1, 2, 3)] + [strip(c, 24, 44, 0.8) for c in (1, 2, 3)]
    assert connected(strips)[1] == pytest.approx([0.9])
    below = [strip(c, 33, 53, 0.8) for c in (1, 2, 3)]  # the common height is 7 of 33 pixels
    assert connected([*strips[:3], *below])[1] == pytest.approx([0.9, 0.8])
    assert connected([*strips[:3], *below], nms_thresh=0.2)[1] == pytest.approx([0.9])


def test_lines_are_suppressed_by_their_quadrilaterals() -> None:
    steep = torch.tensor([0.0, 0, 100, 60, 100, 80, 0, 20])
    below = steep + torch.tensor([0.0, 22] * 4)
    polygons = torch.stack([below, steep, steep + torch.tensor([0.0, 5] * 4)])
    kept, scores = suppress_lines(polygons, torch.tensor([0.7, 0.9, 0.8]), 0.3)
    assert torch.equal(kept, torch.stack([steep, below]))  # their upright boxes overlap by more than a half
    assert scores.tolist() == pytest.approx([0.9, 0.7])
    assert suppress_lines(polygons[:0], scores[:0], 0.3)[0].shape == (0, 8)


def test_overlaps_are_those_of_painted_lines() -> None:
    rng = np.random.default_rng(3)
    polygons = []
    for _ in range(6):
        x, y, width, height, slope = *rng.uniform(10, 60, 2), *rng.uniform([40, 15], [100, 40]), rng.uniform(-0.3, 0.3)
        polygons.append([x, y, x + width, y + slope * width, x + width, y + slope * width + height, x, y + height])
    found = line_overlaps(torch.tensor(polygons, dtype=torch.float64)).numpy()
    painted = np.array([_painted(polygon) for polygon in polygons])
    shared = (painted[:, None] & painted[None]).sum(axis=(2, 3))
    united = (painted[:, None] | painted[None]).sum(axis=(2, 3))
    np.testing.assert_allclose(found, shared / united, atol=0.01)


def _painted(polygon: list[float], scale: int = 4) -> np.ndarray:
    """Pixels whose centres lie in a polygon with upright sides."""
    x0, y0, x1, y1, _, y2, _, y3 = polygon
    x = (np.arange(200 * scale) + 0.5) / scale
    top, bottom = y0 + (y1 - y0) / (x1 - x0) * (x - x0), y3 + (y2 - y3) / (x1 - x0) * (x - x0)
    y = x[:, None]
    return (x >= x0) & (x <= x1) & (y >= top) & (y <= bottom)


def test_all_this_scripts() -> None:
    strips = torch.tensor([strip(c, 20, 40) for c in (1, 2, 3)])

    def plain(strips: Tensor, size: Tensor) -> tuple[Tensor, Tensor]:
        lines = connect_strips(strips, size, *RULES.values())
        return suppress_lines(*lines, 0.3)

    traced = torch.jit.trace(plain, (strips, SIZE))
    many = torch.tensor([strip(c, 20.0 * row, 20.0 * row + 18) for c in (1, 2, 3, 4) for row in range(6)])
    for given in (strips, many, strips[:1], strips[:0]):
        torch.testing.assert_close(traced(given, SIZE), plain(given, SIZE), rtol=0, atol=0)
