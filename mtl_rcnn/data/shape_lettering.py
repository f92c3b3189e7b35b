"""Lines of text for Shape Scenes: words on the free background, mostly level, some slanted, sheared or turned.

The letters are those of the font that Pillow carries in itself (Aileron), so that no font has to be found. A line is
laid out once, large, and brought into the picture by one affine map; the corners of its quadrilateral are the corners
of the letters' tight rectangle under the same map.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from mtl_rcnn.data.shape_sprites import FINE

__all__ = ["Line", "sample_lines"]

_WORDS = (
    "north south east west open closed exit entry stop slow school market harbour bridge river garden station museum "
    "library bakery coffee bread fruit tea books music paper window door street road lane park tower castle forest "
    "mountain island summer winter spring autumn monday friday morning evening today tomorrow please wait push pull "
    "left right upper lower first second third blue green gold silver hotel taxi bus train ferry ticket"
)
LEAST_HEIGHT = 10.0  # of a line of text, in pixels
_MOST_HEIGHT = 0.3  # of the picture's short side
_LAYOUT_SIZE = 56  # of the font, in pixels, before the affine map
_MARGIN = 2  # free pixels around a line
_MOST_TURN, _MOST_SHEAR = math.radians(15), 0.25
_TRIES = 4  # each with smaller letters than the one before
_SHRINK = 0.7


@dataclass(frozen=True)
class Line:
    """A line of text.

    Args:
        transcription: what it says.
        polygon: (4, 2) corners x, y in pixels of the tight quadrilateral around the letters, clockwise from the top
            left as it is read.
        letters: (2h, 2w) bool, fine samples (see `shape_sprites`) that the letters cover.
        window: its (h, w) pixels.
    """

    transcription: str
    polygon: np.ndarray
    letters: np.ndarray
    window: tuple[slice, slice]


def sample_lines(rng: np.random.Generator, taken: np.ndarray, count: int) -> list[Line]:
    """Up to `count` lines of text where the picture is free; fewer where there is no room.

    Args:
        taken: (H, W) bool, pixels that no letter may cover; the lines' own windows are added to it.
    """
    lines = (_sample_line(rng, taken) for _ in range(count))
    return [line for line in lines if line is not None]


def _sample_line(rng: np.random.Generator, taken: np.ndarray) -> Line | None:
    text, layout = _lay_out(rng)
    most = max(_MOST_HEIGHT * min(taken.shape), LEAST_HEIGHT + 1)
    height = LEAST_HEIGHT * (most / LEAST_HEIGHT) ** rng.random()
    turned = rng.random() < 0.25
    turn = rng.uniform(-_MOST_TURN, _MOST_TURN) * turned
    shear = rng.uniform(0, _MOST_SHEAR) * (rng.random() < 0.25)
    draws = rng.random(_TRIES)
    for draw in draws:
        line = _fit(text, layout, height, turn, shear, taken, float(draw))
        if line is not None or height <= LEAST_HEIGHT:
            return line
        height = max(height * _SHRINK, LEAST_HEIGHT)
    return None


def _lay_out(rng: np.random.Generator) -> tuple[str, np.ndarray]:
    """What a line says and its large letters (h, w) uint8, cut tightly."""
    known = _WORDS.split()
    words = [known[int(rng.integers(len(known)))] for _ in range(1 + (rng.random() < 0.3))]
    if rng.random() < 0.25:
        words[-1] = str(int(rng.integers(2, 1000)))
    style = (str, str.upper, str.title)[int(rng.integers(3))]
    text = style(" ".join(words))
    stroke = int(rng.integers(0, 4))
    left, top, right, bottom = _font().getbbox(text, stroke_width=stroke)
    canvas = Image.new("L", (round(right - left), round(bottom - top)))
    ImageDraw.Draw(canvas).text((-left, -top), text, 255, _font(), stroke_width=stroke)
    letters = np.array(canvas)
    x, y, width, height = cv2.boundingRect(letters)
    return text, letters[y : y + height, x : x + width]


@functools.lru_cache(maxsize=1)
def _font() -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(_LAYOUT_SIZE)


def _fit(
    text: str, layout: np.ndarray, height: float, turn: float, shear: float, taken: np.ndarray, draw: float
) -> Line | None:
    """The line so high, where there is room for it; `draw` in [0, 1) chooses the place."""
    letters, corners = _bend(layout, height, turn, shear)
    rows, columns = (side // FINE for side in letters.shape)
    place = _free_place(taken, rows + 2 * _MARGIN, columns + 2 * _MARGIN, draw)
    if place is None:
        return None
    y, x = place[0] + _MARGIN, place[1] + _MARGIN
    window = (slice(y, y + rows), slice(x, x + columns))
    taken[place[0] : y + rows + _MARGIN, place[1] : x + columns + _MARGIN] = True
    return Line(text, corners + np.array([x, y]), letters, window)


def _bend(layout: np.ndarray, height: float, turn: float, shear: float) -> tuple[np.ndarray, np.ndarray]:
    """Fine samples (2h, 2w) bool of the letters sheared, scaled and turned, and the corners (4, 2) of their
    quadrilateral in pixels from the window's top left corner."""
    across, down = layout.shape[1], layout.shape[0]
    scale = height / down
    cos, sin = math.cos(turn), math.sin(turn)
    matrix = scale * np.array([[cos, -sin], [sin, cos]]) @ [[1, -shear], [0, 1]]
    corners = np.array([[0, 0], [across, 0], [across, down], [0, down]]) @ matrix.T
    low = corners.min(0)
    corners -= low
    width, rows = (math.ceil(side) for side in corners.max(0))
    # Sample 0 lies in the middle of pixel 0, at 0.5, and the layout's pixel 0 around its own 0.5.
    shift = FINE * (matrix @ (0.5, 0.5) - low - 0.5)
    moved = cv2.warpAffine(layout, np.c_[FINE * matrix, shift], (FINE * width, FINE * rows), flags=cv2.INTER_LINEAR)
    return moved > 127, corners


def _free_place(taken: np.ndarray, height: int, width: int, draw: float) -> tuple[int, int] | None:
    """Row and column of a free window of this size, any one of all with the same chance."""
    if height > taken.shape[0] or width > taken.shape[1]:
        return None
    sums = cv2.integral(taken.view(np.uint8))
    inside = sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
    free = np.flatnonzero(inside == 0)
    if not len(free):
        return None
    row, column = divmod(int(free[int(draw * len(free))]), inside.shape[1])
    return row, column
