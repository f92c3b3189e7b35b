"""Masks to COCO segmentations that rasterise to exactly the same mask; NumPy and OpenCV only."""

from __future__ import annotations

import cv2
import numpy as np

__all__ = ["mask_to_segmentation"]


def mask_to_segmentation(mask: np.ndarray) -> list[list[int]] | dict[str, list[int]]:
    """COCO segmentation that rasterises to exactly this mask, (H, W) bool and not empty.

    Without holes: one polygon [x0, y0, x1, y1, ...] per 4-connected region, along the pixels' edges (the pixel in
    column x covers [x, x + 1]). With holes, which polygons cannot say: run lengths {"size": [H, W], "counts": [...]},
    column by column, starting with background.
    """
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    polygons = _outlines(mask[y : y + height, x : x + width])
    if polygons is None:
        return _run_lengths(mask)
    return [(loop + np.array([x, y])).ravel().tolist() for loop in polygons]


def _run_lengths(mask: np.ndarray) -> dict[str, list[int]]:
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    counts = np.diff(np.r_[0, changes, flat.size]).tolist()
    return {"size": list(mask.shape), "counts": [0, *counts] if flat[0] else counts}


def _outlines(mask: np.ndarray) -> list[np.ndarray] | None:
    """Loops of corners (P, 2) around the regions of a mask (H, W) bool, or None if one of them has a hole.

    Along each row and each column of pixel corners, the corners of an outline pair up into its edges. Where two pixels
    touch diagonally two corners coincide; they are paired such that the pixels stay apart.
    """
    padded = np.zeros((mask.shape[0] + 2, mask.shape[1] + 2), bool)
    padded[1:-1, 1:-1] = mask
    a, b, c, d = padded[:-1, :-1], padded[:-1, 1:], padded[1:, :-1], padded[1:, 1:]
    falling, rising = a & d & ~b & ~c, b & c & ~a & ~d
    y, x = np.nonzero((a ^ b ^ c ^ d) | falling | rising)
    pick = np.repeat(np.arange(len(x)), 1 + (falling | rising)[y, x])
    y, x = y[pick], x[pick]
    second = np.zeros(len(pick), bool)
    second[1:] = pick[1:] == pick[:-1]
    by_column = np.argsort((x * len(padded) + y) * 2 + (second ^ rising[y, x]))
    partner = np.empty_like(by_column)
    partner[by_column[0::2]], partner[by_column[1::2]] = by_column[1::2], by_column[0::2]
    return _walk(np.stack([x, y], 1), partner.tolist(), mask)


def _walk(corners: np.ndarray, along_column: list[int], mask: np.ndarray) -> list[np.ndarray] | None:
    """Follow the edges, in turns along a row and along a column, until every corner (x, y) is in a loop.

    Corners are sorted by row, so that 2 i and 2 i + 1 are the ends of an edge along a row; `along_column` knows the
    other edges.
    """
    loops: list[np.ndarray] = []
    seen = [False] * len(corners)
    for start, (x, y) in enumerate(corners.tolist()):
        if seen[start]:
            continue
        if not mask[y, x]:  # the first corner of a loop is its upper left one: nothing inside means a hole
            return None
        loop, here = [], start
        while not seen[here]:
            there = here ^ 1
            seen[here] = seen[there] = True
            loop += [here, there]
            here = along_column[there]
        loops.append(corners[loop])
    return loops
