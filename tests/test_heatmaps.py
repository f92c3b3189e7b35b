"""Decoding of keypoint heatmaps against Detectron2's, number by number."""

from __future__ import annotations

import torch
from detectron2.structures.keypoints import heatmaps_to_keypoints

from mtl_rcnn.modeling.heatmaps import highest_points


def heatmaps_and_boxes(regions: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    corners = torch.rand(regions, 2, generator=generator) * 50
    sides = torch.rand(regions, 2, generator=generator) * 90
    return torch.randn(regions, 5, 28, 28, generator=generator), torch.cat([corners, corners + sides], dim=1)


def test_points_and_probabilities_equal_detectron2s() -> None:
    heatmaps, boxes = heatmaps_and_boxes(12)
    boxes[0, 2:] = boxes[0, :2] + 0.3  # less than a pixel
    expected = heatmaps_to_keypoints(heatmaps, boxes)[:, :, [0, 1, 3]]
    assert torch.equal(highest_points(heatmaps, boxes), expected)


def test_no_region_gives_no_points() -> None:
    assert highest_points(*heatmaps_and_boxes(0)).shape == (0, 5, 3)


def test_a_trace_holds_the_loop() -> None:
    traced = torch.jit.trace(highest_points, heatmaps_and_boxes(2))
    for regions in (0, 1, 6):
        given = heatmaps_and_boxes(regions)
        assert torch.equal(traced(*given), highest_points(*given))
