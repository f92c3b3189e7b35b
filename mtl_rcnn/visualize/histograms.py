"""What a dataset holds, as pictures: objects per class, how large they are, and the labels of a task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

SIZE_LIMITS = (32.0, 96.0)
"""Sides in pixels between COCO's small, medium and large objects."""

_MOST_CLASSES = 100
_COLOR = "#3b6ea5"


def draw_classes(path: Path, counts: Mapping[str, int], title: str) -> Path:
    """Writes a PNG with one bar per class, the most frequent on top; beyond a hundred classes, the rarest are summed.

    Args:
        path: of the PNG.
        counts: class name -> number of objects.
        title: of the picture.
    """
    empty = sum(number == 0 for number in counts.values())
    title = f"{title}: {sum(counts.values()):,} objects of {len(counts)} classes, {empty} without any"
    return _bars(path, counts, "classes", title, "objects (crowds not counted)")


def draw_labels(path: Path, counts: Mapping[str, int], labelled: int, title: str) -> Path:
    """Writes a PNG with one bar per label of a task, as `draw_classes`.

    Args:
        path: of the PNG.
        counts: label -> how often it is given.
        labelled: number of images that say something of the task.
        title: of the picture.
    """
    title = f"{title}: {len(counts)} labels in {labelled:,} labelled images"
    return _bars(path, counts, "labels", title, "times given")


def _bars(path: Path, counts: Mapping[str, int], noun: str, title: str, axis: str) -> Path:
    ordered = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
    shown, others = ordered[:_MOST_CLASSES], ordered[_MOST_CLASSES:]
    if others:
        shown.append((f"{len(others)} other {noun}", sum(number for _, number in others)))
    figure = Figure(figsize=(8, max(2.0, 1.2 + 0.19 * len(shown))), layout="constrained")
    axes = figure.subplots()
    values = [number for _, number in shown]
    bars = axes.barh(range(len(shown)), values, color=_COLOR)
    axes.set_yticks(range(len(shown)), [name for name, _ in shown], fontsize=8)
    axes.bar_label(bars, [f"{number:,}" for number in values], padding=3, fontsize=8)
    axes.set_ylim(len(shown) - 0.4, -0.6)
    axes.margins(x=0.12)
    axes.set_xlabel(axis)
    axes.set_title(title)
    return _save(figure, axes, path)


def draw_sizes(path: Path, sides: Sequence[float], title: str) -> Path:
    """Writes a PNG with the distribution of the objects' sizes, on a logarithmic axis.

    Args:
        path: of the PNG.
        sides: square root of each box's area, in pixels of the original image; above 0.
        title: of the picture.
    """
    values = np.asarray([side for side in sides if side > 0], dtype=np.float64)
    figure = Figure(figsize=(8, 4), layout="constrained")
    axes = figure.subplots()
    if len(values):
        low, high = min(values.min(), 8.0), max(values.max(), 128.0)
        axes.hist(values, bins=np.geomspace(low * 0.999, high * 1.001, 41), color=_COLOR)
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_formatter(lambda value, position: f"{value:g}")
    for limit in SIZE_LIMITS:
        axes.axvline(limit, color="black", linestyle="--", linewidth=1)
    shares = [(values < SIZE_LIMITS[0]).mean(), (values >= SIZE_LIMITS[1]).mean()] if len(values) else [0.0, 0.0]
    small, large = shares
    names = f"{small:.0%} small, {1 - small - large if len(values) else 0:.0%} medium, {large:.0%} large"
    axes.set_title(f"{title}: {len(values):,} objects, {names}")
    axes.set_xlabel("square root of the box's area, pixels of the original image; dashed: COCO's size limits")
    axes.set_ylabel("objects")
    return _save(figure, axes, path)


def _save(figure: Figure, axes: object, path: Path) -> Path:
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    FigureCanvasAgg(figure).print_png(path)
    return path
