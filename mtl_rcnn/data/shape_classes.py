"""The vocabulary of Shape Scenes: which classes exist, how each is drawn, and where its keypoints lie.

Everything here is geometry in the unit frame of one object: origin in its middle, x to the right, y down, longest side
about 1. Turning, scaling, placing and colouring belong to `shape_painter`.

Left and right are the object's own. They can be read off the picture, and they survive mirroring: a figure shows a face
and a bib to the viewer or hair and a pack when it turns its back, an arrow has a direction. (A tint for the left limbs
would not do: in a mirrored picture the tint is on the limbs that are then the right ones.)
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import numpy as np

__all__ = ["CLASSES", "MAIN", "TONES", "Outline", "Part", "ShapeClass"]

# A part is painted in one tone of its object's palette: "main" is the object's colour, which "accent" patterns.
TONES = ("main", "accent", "dark", "light", "skin", "trousers")
MAIN, _, DARK, LIGHT, SKIN, TROUSERS = range(len(TONES))


@dataclass(frozen=True)
class Part:
    """One painted piece of an object.

    Args:
        contours: arrays (P, 2) in the unit frame. With width 0 they bound one region by the even-odd rule (the second
            contour of a ring is its hole); otherwise each is a stroke with round ends, a single point being a disc.
        tone: index into `TONES`.
        width: stroke width in the unit frame; 0 fills.
    """

    contours: tuple[np.ndarray, ...]
    tone: int = MAIN
    width: float = 0.0


@dataclass(frozen=True)
class Outline:
    """One drawn instance of a class.

    Args:
        parts: from back to front, in the unit frame.
        keypoints: (K, 2) in the unit frame.
        view: what its class alone tells, name -> value (see `ShapeClass.views`).
    """

    parts: tuple[Part, ...]
    keypoints: np.ndarray
    view: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class ShapeClass:
    """A class of objects.

    Args:
        name: category name.
        category_id: COCO category id; like COCO's, the ids have gaps.
        extent: smallest and largest size as fractions of the image's short side.
        tilt: largest turn from upright, in radians.
        draw: draws one instance from a random generator.
        keypoints: names; `left_x` and `right_x` change places when the image is mirrored.
        skeleton: pairs of 1-based keypoint numbers, as in COCO.
        views: what this class alone tells of an object, name -> possible values; mirroring does not change it.
    """

    name: str
    category_id: int
    extent: tuple[float, float]
    tilt: float
    draw: Callable[[np.random.Generator], Outline]
    keypoints: tuple[str, ...] = ()
    skeleton: tuple[tuple[int, int], ...] = ()
    views: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def _arrow(rng: np.random.Generator) -> Outline:
    barb, reach = rng.uniform(0.24, 0.34), rng.uniform(-0.16, 0.0)
    tip, left, right, tail = np.array([[0, -0.45], [-barb, reach], [barb, reach], [0, 0.43]])
    head = np.stack([tip, left, right])
    # The outline stroke rounds the corners, so that every keypoint lies well inside the object.
    parts = (Part((np.stack([tip, tail]),), width=0.15), Part((head,)), Part((np.stack([*head, tip]),), width=0.1))
    return Outline(parts, np.stack([tip, left, right, tail]))


def _figure(rng: np.random.Generator) -> Outline:
    """A person seen from the front (face, bib) or from behind (hair, pack), arms and legs in any pose."""
    front = rng.random() < 0.5
    left_side = 1.0 if front else -1.0
    arms = {s: _limb(rng, [0.13 * s, -0.23], 0.17, (-0.1, 2.7), (-0.3, 1.7), s) for s in (left_side, -left_side)}
    legs = {s: _limb(rng, [0.075 * s, 0.08], 0.2, (-0.1, 0.75), (-0.7, 0.2), s) for s in (left_side, -left_side)}
    head = np.array([rng.uniform(-0.02, 0.02), -0.38])
    limbs = [Part((leg,), TROUSERS, 0.1) for leg in legs.values()]
    sleeves = [Part((arm[:2],), width=0.085) for arm in arms.values()] + [
        Part((arm[1:],), SKIN, 0.08) for arm in arms.values()
    ]
    parts = (*limbs, *_torso(front), *sleeves, *_head(front, head))
    joints = [side for pair in zip(arms[left_side], arms[-left_side], strict=True) for side in pair]
    joints += [side for pair in zip(legs[left_side], legs[-left_side], strict=True) for side in pair]
    return Outline(parts, np.stack([head, *joints]), {"facing": "front" if front else "back"})


def _limb(
    rng: np.random.Generator,
    root: list[float],
    bone: float,
    swing: tuple[float, float],
    bend: tuple[float, float],
    side: float,
) -> np.ndarray:
    """Root, middle and end joint (3, 2). Angles open from straight down towards `side`, in radians."""
    joints = [root]
    angle = 0.0
    for least, most in (swing, bend):
        angle += rng.uniform(least, most)
        x, y = joints[-1]
        joints.append([x + side * bone * math.sin(angle), y + bone * math.cos(angle)])
    return np.array(joints)


def _torso(front: bool) -> tuple[Part, ...]:
    trunk = np.array([[-0.11, -0.23], [0.11, -0.23], [0.065, 0.07], [-0.065, 0.07], [-0.11, -0.23]])
    body = (Part((trunk,)), Part((trunk,), width=0.09))
    if front:
        return (*body, Part((np.array([[-0.09, -0.27], [0.09, -0.27], [0.0, -0.06]]),), LIGHT))
    return (*body, Part((np.array([[-0.075, -0.21], [0.075, -0.21], [0.075, 0.0], [-0.075, 0.0]]),), DARK))


def _head(front: bool, centre: np.ndarray) -> tuple[Part, ...]:
    if not front:
        return (Part((centre[None],), DARK, 0.22),)
    hair, face, *eyes = centre + np.array([[0, -0.02], [0, 0.02], [-0.045, 0.01], [0.045, 0.01]])
    return (
        Part((hair[None],), DARK, 0.22),
        Part((face[None],), SKIN, 0.19),
        *(Part((eye[None],), DARK, 0.045) for eye in eyes),
    )


def _circle(rng: np.random.Generator) -> Outline:
    return _plain(_round(0.5))


def _rectangle(rng: np.random.Generator) -> Outline:
    half = 0.5 * np.array([rng.uniform(0.45, 1.0), 1.0])
    return _plain(half * [[-1, -1], [1, -1], [1, 1], [-1, 1]])


def _triangle(rng: np.random.Generator) -> Outline:
    half = rng.uniform(0.38, 0.55)
    return _plain(np.array([[rng.uniform(-0.15, 0.15), -0.5], [half, 0.45], [-half, 0.45]]))


def _star(rng: np.random.Generator) -> Outline:
    return _plain(_round(0.55 * np.resize([1.0, rng.uniform(0.4, 0.5)], 10)))


def _ring(rng: np.random.Generator) -> Outline:
    return _plain(_round(0.5), _round(rng.uniform(0.22, 0.3)))


def _plain(*contours: np.ndarray) -> Outline:
    return Outline((Part(contours),), np.zeros((0, 2)))


def _round(radius: float | np.ndarray) -> np.ndarray:
    """Points (P, 2) around the origin at the given radius, or at one radius per point."""
    count = np.size(radius) if np.ndim(radius) else 48
    angles = 2 * np.pi * np.arange(count) / count
    return np.stack([radius * np.sin(angles), -radius * np.cos(angles)], axis=1)


_FIGURE_JOINTS = ("shoulder", "elbow", "wrist", "hip", "knee", "ankle")
_FIGURE_SKELETON = (
    *((1, 2), (1, 3), (2, 3), (2, 8), (3, 9), (8, 9)),  # head and trunk
    *((2, 4), (4, 6), (3, 5), (5, 7)),  # arms
    *((8, 10), (10, 12), (9, 11), (11, 13)),  # legs
)

CLASSES: tuple[ShapeClass, ...] = (
    ShapeClass(
        name="figure",
        category_id=1,
        extent=(0.34, 0.66),
        tilt=0.4,
        draw=_figure,
        keypoints=("head", *(f"{side}_{joint}" for joint in _FIGURE_JOINTS for side in ("left", "right"))),
        skeleton=_FIGURE_SKELETON,
        views={"facing": ("front", "back")},
    ),
    ShapeClass(
        name="arrow",
        category_id=2,
        extent=(0.24, 0.56),
        tilt=np.pi,
        draw=_arrow,
        keypoints=("tip", "left_barb", "right_barb", "tail"),
        skeleton=((1, 4), (1, 2), (1, 3)),
    ),
    ShapeClass("circle", 11, (0.19, 0.45), np.pi, _circle),
    ShapeClass("rectangle", 12, (0.19, 0.5), np.pi, _rectangle),
    ShapeClass("triangle", 13, (0.22, 0.5), np.pi, _triangle),
    ShapeClass("star", 14, (0.24, 0.5), np.pi, _star),
    ShapeClass("ring", 15, (0.22, 0.5), np.pi, _ring),
)
