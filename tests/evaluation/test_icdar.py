"""The protocols of the ICDAR competitions on cases counted by hand, and areas of quadrilaterals."""

from __future__ import annotations

import io
import zipfile

import cv2
import numpy as np
import pytest

from mtl_rcnn.evaluation.icdar import Tally, match_by_areas, match_by_iou, submission
from mtl_rcnn.evaluation.quadrilaterals import area, corners, iou, shared_area, upright, visible_share


def box(left: float, top: float, right: float, bottom: float) -> list[float]:
    return [left, top, right, top, right, bottom, left, bottom]


def tally(tally: Tally) -> tuple[int, int, float, float]:
    return tally.lines, tally.found, tally.recalled, tally.precise


@pytest.mark.parametrize("seed", range(5))
def test_areas_of_convex_quadrilaterals_are_opencvs(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pair = []
    while len(pair) < 2:
        quad = corners(rng.uniform(0, 50, 8))
        hull = cv2.convexHull(quad.astype(np.float32))
        if len(hull) == 4:
            pair.append(hull[:, 0].astype(np.float64))
    expected, _ = cv2.intersectConvexConvex(*(quad.astype(np.float32) for quad in pair))
    assert shared_area(*pair) == pytest.approx(expected, abs=1e-2)
    assert shared_area(pair[0][::-1], pair[1]) == pytest.approx(shared_area(*pair), abs=1e-9)
    assert area(pair[0]) == pytest.approx(cv2.contourArea(pair[0].astype(np.float32)), abs=1e-2)
    assert iou(pair[0], pair[0]) == pytest.approx(1.0)


def test_areas_of_other_quadrilaterals() -> None:
    arrow = corners([0, 0, 10, 5, 0, 10, 4, 5])  # the last corner points inwards
    assert area(arrow) == 30
    assert shared_area(arrow, corners(box(0, 0, 10, 10))) == pytest.approx(30)
    assert shared_area(arrow, corners(box(0, 0, 4, 10))) == pytest.approx(12)
    assert iou(arrow, arrow) == pytest.approx(1)
    crossed = corners([0, 0, 10, 10, 10, 0, 0, 10])
    assert area(crossed) == 100
    flat = corners([0, 0, 5, 0, 10, 0, 2, 0])
    assert area(flat) == 0
    assert iou(flat, flat) == 0
    assert shared_area(flat, corners(box(-1, -1, 20, 1))) == 0
    assert shared_area(corners(box(0, 0, 4, 4)), corners(box(4, 0, 8, 4))) == 0
    assert visible_share(corners(box(-5, 0, 5, 10)), 100, 100) == 0.5


def test_corners_come_upright_whatever_their_order() -> None:
    quad = np.array([[10.0, 12.0], [60.0, 22.0], [58.0, 40.0], [8.0, 30.0]])
    for turned in (quad, quad[::-1]):
        for start in range(4):
            np.testing.assert_array_equal(upright(np.roll(turned, start, axis=0)), quad)
    mirrored = quad * [-1, 1] + [100, 0]
    np.testing.assert_array_equal(upright(mirrored), mirrored[[1, 0, 3, 2]])


def test_iou_one_to_one_and_do_not_care() -> None:
    lines = [box(0, 0, 100, 20), box(0, 40, 100, 60), box(200, 0, 260, 30)]
    found = [
        box(0, 0, 100, 19),  # the first line
        box(0, 1, 100, 21),  # the first line again: too late
        box(0, 40, 50, 60),  # half of the second: an IoU of 0.5 is not above 0.5
        box(205, 0, 300, 30),  # 58 % in the region that nobody cares for
        box(400, 0, 460, 20),  # nothing
    ]
    assert tally(match_by_iou(lines, [False, False, True], found)) == (2, 4, 1, 1)
    found[2] = box(0, 40, 51, 60)
    result = match_by_iou(lines, [False, False, True], found)
    assert tally(result) == (2, 4, 2, 2)
    assert (result.recall, result.precision) == (1.0, 0.5)
    assert result.hmean == pytest.approx(2 / 3)


def test_areas_one_to_one_split_and_merge() -> None:
    lines = [
        box(0, 0, 99, 19),  # found in one piece
        box(0, 40, 99, 59),  # in two pieces
        box(0, 80, 49, 99),  # these two in one
        box(60, 80, 99, 99),
        box(0, 120, 99, 139),  # four fifths of it missed
        box(200, 0, 259, 19),  # nobody cares for this
    ]
    found = [
        box(0, 0, 89, 19),
        box(0, 40, 47, 59),
        box(52, 40, 99, 59),
        box(0, 80, 99, 99),
        box(0, 120, 19, 139),
        box(200, 0, 259, 19),
        box(300, 300, 320, 310),
    ]
    ignored = [False] * 5 + [True]
    # Recall: 1 + 0.8 + 2 of 5 lines. Precision: 1 + 2 * 0.8 + 1 of 6 detections.
    result = match_by_areas(lines, ignored, found)
    assert tally(result) == (5, 6, pytest.approx(3.8), pytest.approx(3.6))
    assert result.recall == pytest.approx(0.76)
    assert result.precision == pytest.approx(0.6)
    assert result.hmean == pytest.approx(2 * 0.76 * 0.6 / 1.36)


def test_areas_where_ports_differ() -> None:
    line = [box(0, 0, 99, 19)]
    piece = box(0, 0, 99, 19)
    scrap = box(90, 0, 200, 100)  # touches the line, but is no part of it
    # Not alone, so no pair at first; as a split of which one piece passes, a pair with full credit.
    assert tally(match_by_areas(line, [False], [piece, scrap])) == (1, 2, 1, 1)
    # Pieces that cover less than four fifths together count nothing.
    assert tally(match_by_areas(line, [False], [box(0, 0, 30, 19), box(60, 0, 99, 19)])) == (1, 2, 0, 0)
    # A detection around two lines that fill less than two fifths of it.
    lines = [box(0, 0, 99, 9), box(0, 90, 99, 99)]
    assert tally(match_by_areas(lines, [False, False], [box(0, 0, 99, 99)])) == (2, 1, 0, 0)


@pytest.mark.parametrize("match", [match_by_iou, match_by_areas])
def test_empty_images(match) -> None:
    assert tally(match([], [], [])) == (0, 0, 0, 0)
    assert tally(match([box(0, 0, 9, 9)], [False], [])) == (1, 0, 0, 0)
    assert tally(match([], [], [box(0, 0, 9, 9)])) == (0, 1, 0, 0)
    assert tally(match([box(0, 0, 9, 9)], [True], [box(0, 0, 9, 9)])) == (0, 0, 0, 0)
    assert Tally().hmean == 0
    assert (Tally(1, 2, 1.0, 0.5) + Tally(1, 1, 0.0, 1.0)) == Tally(2, 3, 1.0, 1.5)


def test_submissions_hold_a_file_per_image() -> None:
    images = {"img_1": [[1.4, 2, 50.6, 3, 50, 20, 1, 19]], "img_2": []}
    with zipfile.ZipFile(io.BytesIO(submission(images))) as archive:
        assert archive.namelist() == ["res_img_1.txt", "res_img_2.txt"]
        assert archive.read("res_img_1.txt") == b"1,2,51,3,50,20,1,19\r\n"
        assert archive.read("res_img_2.txt") == b""
    with zipfile.ZipFile(io.BytesIO(submission(images, boxes=True))) as archive:
        assert archive.read("res_img_1.txt") == b"1,2,51,20\r\n"
    assert submission(images) == submission(images)
