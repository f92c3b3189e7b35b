"""Areas of quadrilaterals and of what two of them share, exactly, whatever their form."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_Points = np.ndarray
"""(P, 2) x, y."""


def corners(numbers: Sequence[float]) -> _Points:
    """(4, 2) corners of x1, y1, ..., x4, y4; where the sides cross, by their angle around the middle instead."""
    points = np.asarray(numbers, dtype=np.float64).reshape(4, 2)
    if _triangles(points):
        return points
    away = points - points.mean(axis=0)
    return points[np.argsort(np.arctan2(away[:, 1], away[:, 0]), kind="stable")]


def area(points: _Points) -> float:
    """Of a polygon (P, 2) whose sides do not cross, at least 0."""
    return abs(_signed_area(points))


def shared_area(one: _Points, other: _Points) -> float:
    """Area that two quadrilaterals (4, 2), as `corners` gives them, have in common; they need not be convex."""
    if (one.min(axis=0) >= other.max(axis=0)).any() or (other.min(axis=0) >= one.max(axis=0)).any():
        return 0.0
    return sum(_clipped_area(a, b) for a in _triangles(one) for b in _triangles(other))


def iou(one: _Points, other: _Points) -> float:
    """Shared area by united area; 0 where both are 0."""
    shared = shared_area(one, other)
    united = area(one) + area(other) - shared
    return shared / united if united > 0 else 0.0


def upright(quad: np.ndarray) -> np.ndarray:
    """(4, 2) corners in the order top left, top right, bottom right, bottom left, whatever the first one was and
    whichever way round they went: of the eight orders the one whose upper and lower edge run furthest to the right,
    with the upper one above."""
    orders = [np.roll(turned, -start, axis=0) for turned in (quad, quad[::-1]) for start in range(4)]

    def rightward(q: np.ndarray) -> float:
        above = q[2:, 1].sum() >= q[:2, 1].sum()
        return (q[1, 0] - q[0, 0]) + (q[2, 0] - q[3, 0]) if above else -np.inf

    return max(orders, key=rightward)


def visible_share(quad: _Points, height: int, width: int) -> float:
    """Share of a quadrilateral's area that lies in the image; 0 of one without area."""
    size = area(quad)
    return shared_area(quad, np.array([[0, 0], [width, 0], [width, height], [0, height]])) / size if size > 0 else 0.0


def _triangles(points: _Points) -> list[_Points]:
    """Two triangles (3, 2) that make up a quadrilateral, turning alike, beside a diagonal that lies inside; none if its
    sides cross."""
    for a, b, c, d in ((0, 1, 2, 3), (1, 2, 3, 0)):
        pair = [points[[a, b, c]], points[[a, c, d]]]
        signs = [_signed_area(triangle) for triangle in pair]
        if signs[0] * signs[1] >= 0:
            return [triangle if sign >= 0 else triangle[::-1] for triangle, sign in zip(pair, signs)]
    return []


def _clipped_area(subject: _Points, window: _Points) -> float:
    """Area of a convex polygon within another (Sutherland and Hodgman, 1974); both have a positive signed area."""
    for start, end in zip(window, np.roll(window, -1, axis=0)):
        if len(subject) == 0:
            return 0.0
        along = end - start
        offset = subject - start
        side = along[0] * offset[:, 1] - along[1] * offset[:, 0]  # positive inside
        following, next_side = np.roll(subject, -1, axis=0), np.roll(side, -1)
        kept = []
        for point, other, here, there in zip(subject, following, side, next_side):
            if here >= 0:
                kept.append(point)
            if here * there < 0:
                kept.append(point + (other - point) * (here / (here - there)))
        subject = np.array(kept).reshape(-1, 2)
    return area(subject) if len(subject) >= 3 else 0.0


def _signed_area(points: _Points) -> float:
    x, y = (points - points[0]).T
    return float(x @ np.roll(y, -1) - y @ np.roll(x, -1)) / 2
