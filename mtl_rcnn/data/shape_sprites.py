"""One object of a Shape Scene, drawn but not yet painted: a random class, place, size, colour and fill style.

A sprite holds labels, not colours: which tone of the object's palette each sample shows. Samples are twice as fine as
the image. Every second one is the middle of a pixel, and decides whether the pixel belongs to the object.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import cv2
import numpy as np

from mtl_rcnn.data.shape_classes import CLASSES, MAIN, Outline, ShapeClass

__all__ = ["COLOURS", "FILLS", "FINE", "Sprite", "sample_sprite"]

FINE = 2  # samples per pixel side
FILLS = ("solid", "striped", "dotted")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (205, 45, 45),
    "orange": (235, 135, 30),
    "yellow": (232, 212, 50),
    "green": (50, 160, 65),
    "cyan": (45, 190, 200),
    "blue": (45, 80, 205),
    "purple": (130, 55, 175),
    "pink": (240, 130, 180),
}

_T = TypeVar("_T")
_SHIFT = 4  # fractional bits of OpenCV's drawing coordinates
_CLASS_BOUNDS = [0.28 + 0.12 * k for k in range(len(CLASSES) - 1)]  # more figures: they are the hardest to learn


@dataclass(frozen=True)
class Sprite:
    """An object drawn and cut to the image. labels: (2h, 2w) uint8, 0 or tone + 1; window: its (h, w) pixels."""

    kind: ShapeClass
    colour: str
    fill: str
    size: float
    centre: np.ndarray
    keypoints: np.ndarray
    labels: np.ndarray
    window: tuple[slice, slice]
    inside: float
    view: Mapping[str, str]

    @property
    def mask(self) -> np.ndarray:
        return self.labels[::FINE, ::FINE] > 0


def sample_sprite(rng: np.random.Generator, nearer: list[Sprite], height: int, width: int) -> Sprite:
    kind = CLASSES[bisect.bisect(_CLASS_BOUNDS, rng.random())]
    size = float(rng.uniform(*kind.extent) * min(height, width))
    centre = rng.uniform(0.08, 0.92, 2) * (width, height)
    colours = list(COLOURS)
    if nearer and rng.random() < 0.45:  # behind the edge of a nearer object, and of another colour
        front = _choose(rng, nearer)
        angle, distance = rng.uniform(0, 2 * np.pi), rng.uniform(0.3, 0.5) * (size + front.size)
        centre = front.centre + distance * np.array([np.cos(angle), np.sin(angle)])
        colours.remove(front.colour)
    outline = kind.draw(rng)
    turn = _rotation(rng.uniform(-kind.tilt, kind.tilt)) * size
    labels, window, inside = _rasterise(outline, turn, centre, size, height, width)
    fill = _choose(rng, FILLS)
    if fill != "solid":
        labels += (labels == MAIN + 1) & _pattern(rng, fill, size, labels.shape)  # main becomes accent
    keypoints = outline.keypoints @ turn.T + centre
    return Sprite(kind, _choose(rng, colours), fill, size, centre, keypoints, labels, window, inside, outline.view)


def _choose(rng: np.random.Generator, options: Sequence[_T]) -> _T:
    return options[int(rng.integers(len(options)))]


def _rotation(angle: float) -> np.ndarray:
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


def _rasterise(
    outline: Outline, turn: np.ndarray, centre: np.ndarray, size: float, height: int, width: int
) -> tuple[np.ndarray, tuple[slice, slice], float]:
    """Draw an outline: its labels and their window, both cut to the image, and the part of its area that is inside."""
    contours = [contour for part in outline.parts for contour in part.contours]
    points = np.concatenate(contours) @ turn.T + centre
    border = 0.5 * size * max(part.width for part in outline.parts) + 1
    left, top = (math.floor(v - border) for v in points.min(0))
    right, bottom = (math.ceil(v + border) for v in points.max(0))
    # Sample 0 is the middle of pixel 0, which is at 0.5.
    fixed = np.rint(FINE * 2**_SHIFT * (points - (left + 0.5, top + 0.5))).astype(np.int32)
    ends = itertools.accumulate(len(contour) for contour in contours)
    placed = (fixed[end - len(contour) : end] for contour, end in zip(contours, ends, strict=True))
    canvas = np.zeros((FINE * (bottom - top), FINE * (right - left)), np.uint8)
    for part in outline.parts:
        _draw(canvas, list(itertools.islice(placed, len(part.contours))), part.tone + 1, FINE * size * part.width)
    x = slice(max(left, 0), max(min(right, width), left, 0))
    y = slice(max(top, 0), max(min(bottom, height), top, 0))
    cut = canvas[FINE * (y.start - top) : FINE * (y.stop - top), FINE * (x.start - left) : FINE * (x.stop - left)]
    return cut, (y, x), cv2.countNonZero(cut) / cv2.countNonZero(canvas) if cut.size else 0.0


def _draw(canvas: np.ndarray, contours: list[np.ndarray], label: int, width: float) -> None:
    """Fill the contours (width 0) or stroke them; fixed-point coordinates with `_SHIFT` bits, width in samples."""
    if width == 0:
        cv2.fillPoly(canvas, contours, label, shift=_SHIFT)
        return
    for contour in contours:
        if len(contour) == 1:
            cv2.circle(canvas, contour[0].tolist(), round(0.5 * width * 2**_SHIFT), label, -1, shift=_SHIFT)
        else:
            cv2.polylines(canvas, [contour], False, label, max(1, round(width)), shift=_SHIFT)


def _pattern(rng: np.random.Generator, fill: str, size: float, shape: tuple[int, int]) -> np.ndarray:
    """Where the accent tone goes, (2h, 2w) bool: stripes in a random direction, or a grid of dots."""
    period = FINE * max(5.0, 0.16 * size)
    y, x = (np.arange(n) + rng.uniform(0, period) for n in shape)
    if fill == "striped":  # phases in 1/256 of a period, so that adding bytes wraps around by itself
        angle = rng.uniform(0, np.pi)
        along_x, along_y = (
            (step * 256 / period * t).astype(np.int64).astype(np.uint8)
            for step, t in ((np.cos(angle), x), (np.sin(angle), y))
        )
        return along_y[:, None] + along_x < 115
    down, across = ((t % period - period / 2).astype(np.float32) ** 2 for t in (y, x))
    return down[:, None] + across < (0.32 * period) ** 2
