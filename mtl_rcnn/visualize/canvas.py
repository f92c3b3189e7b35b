"""An image to draw on: boxes, masks, skeletons and text in the coordinates of the original image.

Small images are enlarged first, so that lines and text stay readable; line widths follow the drawing's size, not the
image's. Text is drawn last, on top, and labels move out of each other's way.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterable, Sequence
from typing import TypeAlias

import cv2
import numpy as np
from torch import Tensor

Color: TypeAlias = tuple[int, int, int]
"""RGB, 0..255."""

_Rectangle: TypeAlias = tuple[int, int, int, int]
"""x0, y0, x1, y1 in pixels of the drawing."""

_FONT = cv2.FONT_HERSHEY_SIMPLEX
_SHIFT = 4
"""Bits of fraction that OpenCV takes in coordinates: lines lie where the numbers say, not on the next pixel."""

_SMALL = 48 * 48
"""Pixels of the drawing: labels keep off boxes that are smaller."""

WHITE: Color = (255, 255, 255)
BLACK: Color = (0, 0, 0)


def color_of(index: int) -> Color:
    """The colour of an instance or a class: the same index has always the same, neighbours differ clearly.

    Hues turn by the golden angle; brightness and saturation change every few steps, so that also distant indices
    differ.
    """
    hue = (0.02 + index * 0.6180339887) % 1.0
    saturation = (0.85, 0.55, 1.0)[index // 8 % 3]
    value = (1.0, 0.9, 0.75)[index // 3 % 3]
    red, green, blue = colorsys.hsv_to_rgb(hue, saturation, value)
    return round(255 * red), round(255 * green), round(255 * blue)


class Canvas:
    """Draws on a copy of an image.

    Args:
        image: (H, W, 3) uint8 RGB.
        class_names: names by class index, for drawings that need them.
        scale: pixels of the drawing per pixel of the image; None enlarges images whose shorter side is under
            `min_side` pixels by a factor of 1..16, and leaves others as they are.
        min_side: see `scale`.
    """

    def __init__(
        self, image: np.ndarray, class_names: Sequence[str] = (), scale: float | None = None, min_side: int = 400
    ) -> None:
        if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
            raise ValueError(f"expected an image (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
        self.class_names = tuple(class_names)
        self.height, self.width = image.shape[:2]
        self.scale = scale or min(max(1.0, min_side / min(image.shape[:2])), 16.0)
        size = (round(self.width * self.scale), round(self.height * self.scale))
        smooth = cv2.INTER_CUBIC if self.scale > 1 else cv2.INTER_AREA
        self._pixels = cv2.resize(image, size, interpolation=smooth) if self.scale != 1 else image.copy()
        self._labels: list[tuple[str, _Rectangle, Color, bool]] = []
        self._captions: list[tuple[str, Color]] = []
        side = float(np.sqrt(size[0] * size[1]))
        self._line = max(2, round(side / 300))
        self._font_scale = float(np.clip(side / 1100, 0.42, 1.2))

    @property
    def image(self) -> np.ndarray:
        """(H', W', 3) uint8 RGB, the drawing with all text, H' = round(H * scale). Drawing may go on afterwards."""
        pixels = self._pixels.copy()
        taken: list[_Rectangle] = []
        for text, color in self._captions:
            width, height = self._text_size(text)
            taken.append(self._inside(0, taken[-1][3] if taken else 0, width, height))  # fonts differ in their heights
            self._text(pixels, text, taken[-1], color)
        small = [around for _, around, _, _ in self._labels if _area(around) < _SMALL]
        for text, around, color, below in self._labels:
            taken.append(self._place(text, around, taken, small, below))
            self._text(pixels, text, taken[-1], color)
        return pixels

    def box(self, xyxy: Sequence[float] | Tensor, label: str = "", color: Color = WHITE) -> None:
        """Outline of a box, XYXY in image pixels, with a text above it (or inside, where there is no room)."""
        x0, y0, x1, y1 = self._scaled(xyxy)
        corners = [self._fixed(x0, y0), self._fixed(x1, y1)]
        # A dark rim keeps bright lines visible on bright ground.
        cv2.rectangle(self._pixels, *corners, BLACK, self._line + 2, cv2.LINE_AA, _SHIFT)
        cv2.rectangle(self._pixels, *corners, color, self._line, cv2.LINE_AA, _SHIFT)
        if label:
            self._labels.append((label, (round(x0), round(y0), round(x1), round(y1)), color, False))

    def note(self, xyxy: Sequence[float] | Tensor, text: str, color: Color = WHITE) -> None:
        """A text below a box, XYXY in image pixels, that something else draws (or inside, where there is no room)."""
        x0, y0, x1, y1 = (round(value) for value in self._scaled(xyxy))
        self._labels.append((text, (x0, y0, x1, y1), color, True))

    def polygon(self, points: Sequence[float] | Tensor, label: str = "", color: Color = WHITE) -> None:
        """Outline of a polygon x1, y1, x2, y2, ... in image pixels, with a text beside it."""
        corners = [(float(x) * self.scale, float(y) * self.scale) for x, y in zip(points[0::2], points[1::2])]
        outline = np.array([self._fixed(x, y) for x, y in corners], dtype=np.int32)
        for paint, width in ((BLACK, self._line + 2), (color, self._line)):
            cv2.polylines(self._pixels, [outline], True, paint, width, cv2.LINE_AA, _SHIFT)
        if label:
            (x0, y0), (x1, y1) = (tuple(map(round, limit(np.array(corners), axis=0))) for limit in (np.min, np.max))
            self._labels.append((label, (x0, y0, x1, y1), color, False))

    def mask(self, mask: np.ndarray | Tensor, color: Color = WHITE, alpha: float = 0.45) -> None:
        """(H, W) bool of the image's size, laid over it with an outline."""
        plane = mask.detach().cpu().numpy() if isinstance(mask, Tensor) else np.asarray(mask)
        if plane.shape != (self.height, self.width):
            raise ValueError(f"expected a mask of the image's size {(self.height, self.width)}, got {plane.shape}")
        size = (self._pixels.shape[1], self._pixels.shape[0])
        # Linear, then cut at one half: enlarged outlines are smooth, not stairs.
        inside = cv2.resize(plane.astype(np.float32), size, interpolation=cv2.INTER_LINEAR) > 0.5
        self._pixels[inside] = ((1 - alpha) * self._pixels[inside] + alpha * np.array(color)).astype(np.uint8)
        outlines, _ = cv2.findContours(inside.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(self._pixels, outlines, -1, color, max(1, self._line // 2), cv2.LINE_AA)

    def skeleton(
        self,
        points: np.ndarray | Tensor,
        edges: Iterable[tuple[int, int]] = (),
        color: Color = WHITE,
        threshold: float = 0.0,
    ) -> None:
        """Keypoints and the lines between them.

        Args:
            points: (K, 3) x, y in image pixels and visibility or score; points at or below `threshold` are not drawn,
                nor are their edges.
            edges: pairs of indices into K.
        """
        rows = points.detach().cpu().tolist() if isinstance(points, Tensor) else np.asarray(points).tolist()
        shown = {
            index: (x * self.scale, y * self.scale) for index, (x, y, score) in enumerate(rows) if score > threshold
        }
        places = {index: self._fixed(x, y) for index, (x, y) in shown.items()}
        lines = [(places[a], places[b]) for a, b in edges if a in places and b in places]
        # A figure of 30 pixels would vanish under lines and dots made for one of 300.
        tiny = not shown or _extent(shown.values()) < 100
        line, rim, dot = (2, 1, 1) if tiny else (self._line, 2, self._line + 1)
        for paint, extra in ((BLACK, rim), (color, 0)):
            for start, end in lines:
                cv2.line(self._pixels, start, end, paint, line + extra, cv2.LINE_AA, _SHIFT)
        for place in places.values():
            for paint, radius in ((BLACK, dot + 2), (WHITE, dot + 1), (color, dot)):
                cv2.circle(self._pixels, place, radius << _SHIFT, paint, cv2.FILLED, cv2.LINE_AA, _SHIFT)

    def raster(self, colors: np.ndarray, alpha: float = 0.5) -> None:
        """(H, W, 3) uint8 RGB of the image's size, laid over all of it: dense predictions."""
        size = (self._pixels.shape[1], self._pixels.shape[0])
        layer = cv2.resize(colors, size, interpolation=cv2.INTER_NEAREST)
        self._pixels = cv2.addWeighted(layer, alpha, self._pixels, 1 - alpha, 0)

    def caption(self, text: str, color: Color = BLACK) -> None:
        """A line of text in the upper left corner, below earlier ones, on a plate of the colour."""
        self._captions.append((text, color))

    def _place(
        self,
        text: str,
        around: _Rectangle,
        taken: Sequence[_Rectangle],
        small: Sequence[_Rectangle],
        below: bool = False,
    ) -> _Rectangle:
        """Of the places near the box the one that hides least: first of other labels, then of small objects."""
        width, height = self._text_size(text)
        x0, y0, x1, y1 = around
        corners = [
            (x0, y0 - height),
            (x0, y0),
            (x1 - width, y0 - height),
            (x0, y1 - height),
            (x0, y1),
            (x1 - width, y0),
        ]
        beside = [(x1, y0), (x0 - width, y0), (x0, y0 - 2 * height), (x0, y1 + height)]
        if below:
            corners = [(x0, y1), (x0, y1 - height), (x1 - width, y1), (x0, y0), (x1 - width, y1 - height)]
        places = [self._inside(x, y, width, height) for x, y in (*corners, *beside)]

        def hidden(place: _Rectangle) -> int:
            labels = sum(_overlap(place, other) for other in taken)
            return 4 * labels + sum(_overlap(place, other) for other in small)

        return min(places, key=hidden)

    def _scaled(self, xyxy: Sequence[float] | Tensor) -> tuple[float, float, float, float]:
        x0, y0, x1, y1 = (float(value) * self.scale for value in xyxy)
        return x0, y0, x1, y1

    def _inside(self, x: int, y: int, width: int, height: int) -> _Rectangle:
        """The rectangle moved into the drawing."""
        x = max(0, min(x, self._pixels.shape[1] - width))
        y = max(0, min(y, self._pixels.shape[0] - height))
        return x, y, x + width, y + height

    def _text_size(self, text: str) -> tuple[int, int]:
        """Width and height of a text with its margin."""
        (width, height), baseline = cv2.getTextSize(text, _FONT, self._font_scale, 1)
        return width + 6, height + baseline + 4

    def _text(self, pixels: np.ndarray, text: str, place: _Rectangle, color: Color) -> None:
        """Text on a plate of the colour, black or white, whichever is easier to read on it."""
        x0, y0, x1, y1 = place
        plate = pixels[y0:y1, x0:x1]
        plate[:] = (0.8 * np.array(color) + 0.2 * plate).astype(np.uint8)
        _, baseline = cv2.getTextSize(text, _FONT, self._font_scale, 1)
        ink = BLACK if _luminance(color) > 110 else WHITE
        cv2.putText(pixels, text, (x0 + 3, y1 - baseline - 1), _FONT, self._font_scale, ink, 1, cv2.LINE_AA)

    def _fixed(self, x: float, y: float) -> tuple[int, int]:
        """Continuous coordinates (0.5 is the centre of the first pixel) as OpenCV's, with `_SHIFT` bits of fraction."""
        limit = 1 << 20
        x, y = (max(-limit, min(limit, value - 0.5)) for value in (x, y))
        return round(x * (1 << _SHIFT)), round(y * (1 << _SHIFT))


def _area(a: _Rectangle) -> int:
    return max(0, a[2] - a[0]) * max(0, a[3] - a[1])


def _overlap(a: _Rectangle, b: _Rectangle) -> int:
    return max(0, min(a[2], b[2]) - max(a[0], b[0])) * max(0, min(a[3], b[3]) - max(a[1], b[1]))


def _extent(points: Iterable[tuple[float, float]]) -> float:
    """The longer side of the box around the points."""
    return float(np.ptp(np.array(list(points)), axis=0).max())


def _luminance(color: Color) -> float:
    return 0.299 * color[0] + 0.587 * color[1] + 0.114 * color[2]
