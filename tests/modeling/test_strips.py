"""Anchors in columns: labels against a slow reference, coordinates there and back."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mtl_rcnn.modeling.strips import StripRules, decode_vertical, encode_vertical, grid_strips, label_strips

HEIGHTS = [8.0, 14.0, 22.0]
STRIDE = 16
SHAPE = (5, 7, 3)
SIZE = (74, 100)  # the rest of 80 x 112 is padding


def anchors() -> torch.Tensor:
    return grid_strips(torch.zeros(1, *SHAPE[:2], 3, 5), torch.tensor(HEIGHTS), STRIDE)


def random_lines(seed: int, number: int) -> np.ndarray:
    """(L, 4, 2) oriented lines, some beyond the image, some narrower than a column."""
    rng = np.random.default_rng(seed)
    quads = []
    for _ in range(number):
        x, y, width, height = *rng.uniform(0, [100, 70]), rng.uniform(5, 80), rng.uniform(6, 30)
        slope, lean = rng.uniform(-0.3, 0.3), rng.uniform(-4, 4)
        top = [[x + lean, y], [x + width + lean, y + slope * width]]
        quads.append([*top, [x + width, y + slope * width + height], [x, y + height]])
    return np.array(quads)


def test_the_grid_is_in_the_order_of_the_map() -> None:
    grid = anchors().view(*SHAPE, 3)
    assert grid[2, 3, 1].tolist() == [3.5 * STRIDE, 2.5 * STRIDE, 14.0]
    assert grid[:, :, :, 0].max() == 6.5 * STRIDE


def test_vertical_coordinates_there_and_back() -> None:
    grid = anchors()
    top = torch.rand(len(grid), generator=torch.Generator().manual_seed(0)) * 50
    bottom = top + 1 + top.flip(0)
    encoded = encode_vertical(grid, top, bottom)
    assert encoded[0].tolist() == pytest.approx(
        [((top[0] + bottom[0]) / 2 - 8).item() / 8, math.log((bottom[0] - top[0]).item() / 8)], abs=1e-5
    )
    found = decode_vertical(grid, encoded)
    torch.testing.assert_close(found[0], top, rtol=0, atol=1e-4)
    torch.testing.assert_close(found[1], bottom, rtol=0, atol=1e-4)


@pytest.mark.parametrize("seed", range(12))
def test_labels_are_those_of_a_slow_reference(seed: int) -> None:
    quads = random_lines(seed, 1 + seed % 4)
    ignored = np.array([index % 3 == 1 for index in range(len(quads))])
    rules = StripRules(0.6, 0.4, 0.45, 20.0)
    found = label_strips(
        anchors(), SHAPE, torch.tensor(quads, dtype=torch.float32), torch.tensor(ignored), SIZE, STRIDE, rules
    )
    expected = reference(quads, ignored, rules)
    for index, anchor in enumerate(anchors().tolist()):
        label, vertical, side = expected[index]
        assert found.labels[index] == label, anchor
        assert bool(found.valid[index]) == (vertical is not None), anchor
        assert bool(found.beside[index]) == (side is not None), anchor
        if vertical is not None:
            assert found.vertical[index].tolist() == pytest.approx(vertical, abs=1e-4)
        if side is not None:
            assert float(found.side[index]) == pytest.approx(side, abs=1e-4)


def test_small_anchors_within_a_high_line_are_background() -> None:
    high = torch.tensor([[[0.0, 8], [96, 8], [96, 72], [0, 72]]])
    found = label_strips(anchors(), SHAPE, high, torch.tensor([False]), SIZE, STRIDE, StripRules())
    assert (found.labels.view(SHAPE)[1:4, :6, 0] == 0).all()


def test_an_image_without_lines_is_all_background() -> None:
    nothing = label_strips(
        anchors(), SHAPE, torch.zeros(0, 4, 2), torch.zeros(0, dtype=torch.bool), SIZE, STRIDE, StripRules()
    )
    outside = np.array([x >= SIZE[1] or y >= SIZE[0] for x, y, _ in anchors().tolist()])
    assert outside.any()
    np.testing.assert_array_equal(nothing.labels.numpy(), np.where(outside, -1, 0))
    assert not nothing.valid.any()
    assert not nothing.beside.any()


def reference(quads: np.ndarray, ignored: np.ndarray, rules: StripRules) -> list[tuple]:
    """(label, vertical or None, side or None) of every anchor, one after the other."""
    grid = anchors().numpy().astype(np.float64)
    strips = {}  # (line, column) -> top, bottom, own, touched
    limits = []
    for line, quad in enumerate(quads):
        left = np.clip((quad[0, 0] + quad[3, 0]) / 2, 0, SIZE[1])
        right = np.clip((quad[1, 0] + quad[2, 0]) / 2, 0, SIZE[1])
        limits.append((left, right))
        centres = [(column + 0.5) * STRIDE for column in range(SHAPE[1])]
        own = [left <= x <= right for x in centres]
        if not any(own) and right > left:
            own[int(np.argmin([abs(x - (left + right) / 2) for x in centres]))] = True
        for column, x in enumerate(centres):
            top, bottom = height_at(quad[0], quad[1], x), height_at(quad[3], quad[2], x)
            touched = quad[:, 0].min() < x + STRIDE / 2 and quad[:, 0].max() > x - STRIDE / 2
            strips[line, column] = top, max(bottom, top + 1), own[column] and not ignored[line], touched
    overlap = np.zeros((len(quads), len(grid)))
    inside = np.zeros_like(overlap)
    for line in range(len(quads)):
        for index, (x, y, height) in enumerate(grid):
            top, bottom, _, _ = strips[line, int(x // STRIDE)]
            shared = max(0.0, min(bottom, y + height / 2) - max(top, y - height / 2))
            overlap[line, index] = shared / (bottom - top + height - shared)
            inside[line, index] = shared / height
    column_of = (grid[:, 0] // STRIDE).astype(int)
    result = []
    for index, (x, y, height) in enumerate(grid):
        own = [line for line in range(len(quads)) if strips[line, column_of[index]][2]]
        match = max(own, key=lambda line: overlap[line, index], default=None)
        best = 0.0 if match is None else overlap[match, index]
        forced = any(overlap[line, index] == overlap[line, column_of == column_of[index]].max() > 0 for line in own)
        padding = x >= SIZE[1] or y >= SIZE[0]
        positive = (best > rules.positive_iou or forced) and not padding
        spared = any(
            strips[line, column_of[index]][3]
            and not strips[line, column_of[index]][2]
            and (overlap[line, index] >= rules.negative_iou or inside[line, index] > 0.5)
            for line in range(len(quads))
        )
        label = 1 if positive else 0 if best < rules.negative_iou and not spared and not padding else -1
        if not positive and (best <= rules.regression_iou or padding):
            result.append((label, None, None))
            continue
        top, bottom, _, _ = strips[match, column_of[index]]
        vertical = [((top + bottom) / 2 - y) / height, math.log((bottom - top) / height)]
        away = min((end - x for end in limits[match]), key=abs)
        result.append((label, vertical, away / STRIDE if abs(away) <= rules.side_distance else None))
    return result


def height_at(start: np.ndarray, end: np.ndarray, x: float) -> float:
    return float(start[1] + (end[1] - start[1]) / (end[0] - start[0]) * (x - start[0]))
