"""Distances in Shape Scenes, and the haze that lets them be seen.

The rule. Every object is a plane of its own, parallel to the picture, at one distance. The distances of a scene's n
objects are n independent draws between 1.5 m and 5.5 m, uniform in the logarithm, given out in the painter's order: the
nearer of two objects covers the other. The background is a floor that rises into the distance: 6 m at the lower edge of
the picture, somewhere from 8 m to 12 m at the upper edge, and in between the inverse of the distance is linear in the
row, as on a plane in perspective.

What shows it. Light that has come d metres through the haze keeps exp(-d / 10 m) of its colour; the rest is the colour
of the haze, the same in all scenes but for the light's tint. So colours and contrasts fade with the distance: 86 % is
left at 1.5 m, 58 % at 5.5 m, 30 % at 12 m. The second sign is who covers whom, and the third, on the floor, the row.
"""

from __future__ import annotations

import numpy as np

__all__ = ["HAZE", "depth_map", "kept_colour", "sample_distances", "sample_floor"]

HAZE = (196.0, 205.0, 214.0)
"""Red, green, blue, 0..255."""

_NEAREST, _FARTHEST = 1.5, 5.5
_FLOOR_NEAR, _FLOOR_FAR = 6.0, (8.0, 12.0)
_RANGE = 10.0
_MARGIN = 2
"""Pixels along the picture's border without a distance, as sensors have them."""


def sample_distances(rng: np.random.Generator, count: int) -> np.ndarray:
    """(count,) metres, whole millimetres, from the farthest object to the nearest."""
    drawn = np.exp(rng.uniform(np.log(_NEAREST), np.log(_FARTHEST), count))
    return np.sort(drawn.round(3))[::-1]


def sample_floor(rng: np.random.Generator, height: int) -> np.ndarray:
    """(height,) metres of the background by row, from the upper edge down."""
    return 1 / np.linspace(1 / rng.uniform(*_FLOOR_FAR), 1 / _FLOOR_NEAR, height)


def kept_colour(distance: np.ndarray) -> np.ndarray:
    """Which part of its colour light keeps on its way of so many metres, in (0, 1]."""
    return np.exp(-distance / _RANGE)


def depth_map(id_map: np.ndarray, distances: np.ndarray, floor: np.ndarray) -> np.ndarray:
    """(H, W) float32 metres, 0 where nothing is known.

    Args:
        id_map: (H, W), 0 background, object `order + 1` otherwise.
        distances: of the objects by order, metres.
        floor: (H,) metres.
    """
    depth = np.where(id_map > 0, np.append(0, distances)[id_map], floor[:, None]).astype(np.float32)
    known = np.zeros(id_map.shape, bool)
    known[_MARGIN:-_MARGIN, _MARGIN:-_MARGIN] = True
    return depth * known
