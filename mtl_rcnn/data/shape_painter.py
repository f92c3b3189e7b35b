"""Paints one Shape Scene: textured background, then objects from the farthest to the nearest.

`sample_scene` is a pure function of (seed, split, index, size, flavour). The scene that it returns keeps, for every
object, its class, colour, fill style, size and painter's order, and for every pixel the object that is on top
(`id_map`); every label of the data set is read off these. What flavours add (distances with haze: `shape_depth`, lines
of text: `shape_lettering`) has draws of its own, so that a scene shows the same objects in every flavour that has as
many of them. Picture and masks come from one drawing, twice as fine as the image: a pixel belongs to the object on the
sample in its middle, and shows a Gaussian mean around that sample.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import cv2
import numpy as np

from mtl_rcnn.data.shape_classes import TONES, ShapeClass
from mtl_rcnn.data.shape_depth import HAZE, depth_map, kept_colour, sample_distances, sample_floor
from mtl_rcnn.data.shape_lettering import Line, sample_lines
from mtl_rcnn.data.shape_sprites import COLOURS, FINE, Sprite, sample_sprite

__all__ = ["FLAVOURS", "SPLITS", "Flavour", "Scene", "SceneObject", "sample_scene"]

SPLITS = ("train", "val")
_DARK, _LIGHT, _SKIN, _TROUSERS = (25, 25, 25), (240, 240, 240), (235, 190, 150), (85, 90, 120)
_MIN_INSIDE = 0.6  # an object shows at least this part of itself inside the image,
_MIN_VISIBLE = 0.35  # of that at least this part uncovered,
_MIN_AREA = 0.003  # and covers at least this part of (short side)^2


@dataclass(frozen=True)
class Flavour:
    """A kind of scenes.

    Args:
        objects: least and largest number of objects to try for.
        hazy: whether objects and background have distances, which haze shows.
        lines: chances of 0, 1, 2, ... lines of text to try for.
    """

    objects: tuple[int, int] = (3, 6)
    hazy: bool = False
    lines: tuple[float, ...] = (1.0,)


FLAVOURS = {
    "plain": Flavour(),
    "full": Flavour(hazy=True, lines=(0.2, 0.3, 0.3, 0.2)),
    "lettered": Flavour(objects=(1, 3), lines=(0.04, *[0.16] * 6)),
}


@dataclass(frozen=True)
class SceneObject:
    """What is known of one object.

    Args:
        kind: its class.
        colour: key of `shape_sprites.COLOURS`.
        fill: one of `shape_sprites.FILLS`.
        size: length of its longest side before turning and cropping, in pixels.
        order: painter's order, 0 the farthest; its pixels are `Scene.id_map == order + 1`.
        visible_fraction: uncovered part of its area inside the image, in (0, 1].
        keypoints: (K, 3) int32 rows x, y, v: pixel indices in the image; v = 2 if this object is on top there, 1 if
            another object covers it, 0 (then x = y = 0) outside the image.
        view: what else its class tells, attribute -> value.
        distance: in metres, in flavours that have distances.
    """

    kind: ShapeClass
    colour: str
    fill: str
    size: float
    order: int
    visible_fraction: float
    keypoints: np.ndarray
    view: Mapping[str, str]
    distance: float | None = None


@dataclass(frozen=True)
class Scene:
    """What is painted.

    Args:
        image: (H, W, 3) uint8 RGB.
        id_map: (H, W) uint8, 0 background.
        objects: from the farthest to the nearest.
        depth: (H, W) float32 metres, 0 where unknown; None in flavours without distances.
        lines: of text, on the background alone; None in flavours without text.
    """

    image: np.ndarray
    id_map: np.ndarray
    objects: tuple[SceneObject, ...]
    depth: np.ndarray | None = None
    lines: tuple[Line, ...] | None = None


def sample_scene(seed: int, split: str, index: int, size: tuple[int, int], flavour: str = "plain") -> Scene:
    """Draw scene `index` (from 0) of a split: nominal (width, height) in pixels, flavour a key of `FLAVOURS`.

    One scene in four is portrait (sides exchanged), and all are up to 10 % larger or smaller than nominal.
    """
    kind = FLAVOURS[flavour]
    rng, extras = (_generator(seed, SPLITS.index(split), index, *stream) for stream in ((), (1,)))
    scale = rng.uniform(0.9, 1.1)
    width, height = (round(scale * side) for side in (size[::-1] if rng.random() < 0.25 else size))
    sprites = _place(rng, kind.objects, height, width)
    id_map = _paint_ids(sprites, height, width)
    haze = _Haze(sample_distances(extras, len(sprites)), sample_floor(extras, height)) if kind.hazy else None
    lines = sample_lines(extras, id_map > 0, _count(extras, kind.lines)) if len(kind.lines) > 1 else None
    image = _render(rng, sprites, height, width, haze)
    if lines:
        _write(extras, image, lines)
    objects = tuple(_describe(sprite, i, id_map, haze) for i, sprite in enumerate(sprites))
    depth = None if haze is None else depth_map(id_map, haze.distances, haze.floor)
    return Scene(image, id_map, objects, depth, None if lines is None else tuple(lines))


def _generator(seed: int, *key: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(np.random.SeedSequence(seed, spawn_key=key)))


def _count(rng: np.random.Generator, chances: tuple[float, ...]) -> int:
    """A number from 0, each with its chance."""
    return int(np.searchsorted(np.cumsum(chances)[:-1], rng.random(), side="right"))


# ---------------------------------------------------------------------------------------------------------------------
# Placing: from the nearest object to the farthest, so that accepting one never hides another that was accepted before.


def _place(rng: np.random.Generator, least_most: tuple[int, int], height: int, width: int) -> list[Sprite]:
    """Sprites from the farthest to the nearest, each visible enough to be worth an annotation."""
    wanted = int(rng.integers(least_most[0], least_most[1] + 1))
    free = np.ones((height, width), bool)
    sprites: list[Sprite] = []
    for _ in range(3 * wanted):
        sprite = sample_sprite(rng, sprites, height, width)
        if _worth_keeping(sprite, free):
            free[sprite.window] &= ~sprite.mask
            sprites.append(sprite)
        if len(sprites) == wanted:
            break
    return sprites[::-1]


def _worth_keeping(sprite: Sprite, free: np.ndarray) -> bool:
    mask = sprite.mask
    full, visible = np.count_nonzero(mask), np.count_nonzero(mask & free[sprite.window])
    enough = max(_MIN_VISIBLE * full, _MIN_AREA * min(free.shape) ** 2, 1)
    return sprite.inside >= _MIN_INSIDE and visible >= enough


# ---------------------------------------------------------------------------------------------------------------------
# Painting the scene


@dataclass(frozen=True)
class _Haze:
    """distances: (N,) of the objects by order. floor: (H,) of the background by row. Both in metres."""

    distances: np.ndarray
    floor: np.ndarray


def _paint_ids(sprites: list[Sprite], height: int, width: int) -> np.ndarray:
    id_map = np.zeros((height, width), np.uint8)
    for order, sprite in enumerate(sprites):
        id_map[sprite.window][sprite.mask] = order + 1
    return id_map


def _render(rng: np.random.Generator, sprites: list[Sprite], height: int, width: int, haze: _Haze | None) -> np.ndarray:
    """Objects over background, then light and sensor noise; (H, W, 3) uint8 RGB."""
    tint = rng.uniform(0.75, 1.1) * rng.uniform(0.94, 1.06, 3)  # exposure and colour of the light
    canvas = np.zeros((FINE * height, FINE * width), np.uint8)
    palette = np.zeros((256, 4), np.uint8)  # by label: red, green, blue, coverage
    for order, sprite in enumerate(sprites):
        first = order * len(TONES)
        tones = _palette(rng, COLOURS[sprite.colour], tint)
        if haze is not None:
            tones = _veiled(tones, kept_colour(haze.distances[order]), tint)
        palette[first + 1 : first + 1 + len(TONES), :3] = tones
        palette[first + 1 : first + 1 + len(TONES), 3] = 255
        view = canvas[tuple(slice(FINE * s.start, FINE * s.stop) for s in sprite.window)]
        np.copyto(view, sprite.labels + np.uint8(first), where=sprite.labels > 0)
    *colours, coverage = _pixel_means(canvas, palette)
    background = _background(rng, tint, height, width)
    if haze is not None:
        kept = kept_colour(haze.floor).astype(np.float32)
        background = _veiled(background, kept[:, None], tint[:, None, None]).astype(np.float32)
    image = background * (1 - coverage.astype(np.float32) / 255)
    image += np.stack(colours)
    image *= 1 + np.float32(0.1) * _clouds(rng, (3, 3), height, width)[..., 0]  # soft fall-off
    noise = np.frombuffer(rng.bytes(height * width), np.uint8).reshape(height, width)
    image += (noise.astype(np.float32) - np.float32(127.5)) * np.float32(rng.uniform(0.02, 0.09))
    return cv2.merge(list(np.clip(image, 0, 255, out=image).astype(np.uint8)))


def _veiled(colours: np.ndarray, kept: np.ndarray, tint: np.ndarray) -> np.ndarray:
    """Colours of which the haze leaves the part `kept`; tint holds the channels, as the haze's colour does."""
    haze = np.reshape(HAZE, tint.shape) * tint
    return kept * colours + (1 - kept) * haze


def _write(rng: np.random.Generator, image: np.ndarray, lines: list[Line]) -> None:
    """Put lines of text on the picture, in place: bright letters where it is dark, and the reverse."""
    for line in lines:
        view = image[line.window]
        dark = view.mean() > rng.uniform(110, 150)
        colour = rng.uniform(0, 60, 3) if dark else rng.uniform(200, 255, 3)
        samples = cv2.copyMakeBorder(line.letters.view(np.uint8) * 255, *[2 * FINE] * 4, cv2.BORDER_CONSTANT)
        cover = cv2.pyrDown(samples)[2:-2, 2:-2, None].astype(np.float32) / 255
        view[:] = (cover * colour.astype(np.float32) + (1 - cover) * view).astype(np.uint8)


def _pixel_means(canvas: np.ndarray, palette: np.ndarray) -> tuple[np.ndarray, ...]:
    """Colours around the pixels' middles: labels (2H, 2W), palette (256, 4) to four planes (H, W), all uint8."""
    packed = cv2.LUT(canvas, palette.view(np.int32).ravel())  # all four channels of a sample at once
    return cv2.split(cv2.pyrDown(packed.view(np.uint8).reshape(*canvas.shape, 4)))


def _palette(rng: np.random.Generator, colour: tuple[int, int, int], tint: np.ndarray) -> np.ndarray:
    """The object's tones under the light, (len(TONES), 3) RGB, each a little off its nominal colour."""
    scale, shift = (0.55, 0.0) if sum(colour) > 330 else (0.45, 140.0)  # a darker accent, or a lighter one on dark
    accent = [scale * value + shift for value in colour]
    tones = np.array([colour, accent, _DARK, _LIGHT, _SKIN, _TROUSERS])
    tones[-2:] *= rng.uniform(0.55, 1.1, (2, 1))
    return np.clip((tones + rng.normal(0, 9, tones.shape)) * tint, 0, 255)


def _background(rng: np.random.Generator, tint: np.ndarray, height: int, width: int) -> np.ndarray:
    """Muted texture (3, H, W) float32 RGB: coarse clouds of colour, fine clouds of grey, often stripes."""
    base = (rng.uniform(60, 190) + rng.uniform(-22, 22, 3)) * tint
    contrast, grain = rng.uniform(8, 26), rng.uniform(3, 12)
    coarse = _clouds(rng, (5, 7, 3), height // 4, width // 4) * np.float32(contrast)
    fine = rng.standard_normal((height // 4, width // 4, 1), np.float32) * np.float32(grain)
    texture = np.stack(cv2.split(cv2.resize(coarse + fine + base.astype(np.float32), (width, height))))
    if rng.random() < 0.6:
        texture += _waves(rng, height, width) * np.float32(rng.uniform(4, 16))
    return np.clip(texture, 0, 255, out=texture)


def _waves(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """Sine waves in a random direction, (H, W) float32 in [-1, 1]."""
    angle, period, phase = rng.uniform(0, np.pi), rng.uniform(5, 24), rng.uniform(0, 2 * np.pi)
    y, x = (np.arange(n, dtype=np.float32) * np.float32(2 * np.pi / period) for n in (height, width))
    return np.sin(y[:, None] * np.float32(np.sin(angle)) + (x * np.float32(np.cos(angle)) + np.float32(phase)))


def _clouds(rng: np.random.Generator, grid: tuple[int, ...], height: int, width: int) -> np.ndarray:
    """Smooth noise (H, W, C) float32 between random values on a grid of (rows, columns[, C]) nodes."""
    nodes = np.clip(rng.standard_normal(grid, np.float32), -2, 2)
    smooth = cv2.resize(nodes, (max(width // 8, 16), max(height // 8, 16)), interpolation=cv2.INTER_CUBIC)
    return np.atleast_3d(cv2.resize(smooth, (width, height)))  # curved first, then straight: much faster


# ---------------------------------------------------------------------------------------------------------------------
# What is known of each object


def _describe(sprite: Sprite, order: int, id_map: np.ndarray, haze: _Haze | None) -> SceneObject:
    return SceneObject(
        kind=sprite.kind,
        colour=sprite.colour,
        fill=sprite.fill,
        size=sprite.size,
        order=order,
        visible_fraction=np.count_nonzero(id_map == order + 1) / np.count_nonzero(sprite.mask),
        keypoints=_keypoints(sprite.keypoints, order, id_map),
        view=sprite.view,
        distance=None if haze is None else float(haze.distances[order]),
    )


def _keypoints(points: np.ndarray, order: int, id_map: np.ndarray) -> np.ndarray:
    """Points (K, 2) in pixels to rows x, y, v."""
    pixels = np.floor(points).astype(np.int32)
    rows = np.zeros((len(pixels), 3), np.int32)
    inside = ((pixels >= 0) & (pixels < id_map.shape[::-1])).all(1)
    rows[inside, :2] = pixels[inside]
    rows[inside, 2] = 1 + (id_map[pixels[inside, 1], pixels[inside, 0]] == order + 1)
    return rows
