"""Figures of an evaluation: precision over recall, and which class is taken for which."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mtl_rcnn.errors import MtlRcnnError
from mtl_rcnn.evaluation.analysis import Analysis

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

INK, _GRID, _LINE, _POINT = "#1f2933", "#d9dee3", "#0b6e99", "#c2410c"
_MOST_NUMBERS = 24
"""Classes up to which the cells of a confusion matrix hold their numbers."""


def draw_curves(path: Path, analysis: Analysis, title: str) -> Path:
    """One small panel per class: precision over recall at a similarity of 0.5, and the point of highest F1.

    Raises:
        MtlRcnnError: the file cannot be written.
    """
    names = list(analysis.curves)
    columns = max(1, min(6, math.ceil(math.sqrt(len(names) * 1.6))))
    rows = max(1, math.ceil(len(names) / columns))
    figure, axes = new_figure(rows, columns, (2.4 * columns, 2.3 * rows + 0.5))
    for axis, name in zip(axes, names):
        curve = analysis.curves[name]
        axis.fill_between(curve.recall, curve.precision, color=_LINE, alpha=0.12, linewidth=0)
        axis.plot(curve.recall, curve.precision, color=_LINE, linewidth=1.6)
        point = analysis.points[name]
        if point.threshold is not None:
            axis.plot([point.recall], [point.precision], "o", color=_POINT, markersize=5, clip_on=False)
            label = f"F1 {100 * point.f1:.0f} from {point.threshold:.2f}"
            axis.text(0.04, 0.05, label, fontsize=7, color=_POINT)
        axis.set_title(f"{name}   AP50 {100 * curve.precision.mean():.1f}", fontsize=8, color=INK)
    for axis in axes[len(names) :]:
        axis.set_axis_off()
    figure.suptitle(f"{title}: precision over recall", fontsize=10, color=INK)
    return save_figure(figure, path)


def draw_confusion(path: Path, analysis: Analysis, title: str) -> Path:
    """The matrix of confusions; a cell's colour is its share of its row, its number the count.

    Raises:
        MtlRcnnError: the file cannot be written.
    """
    names, counts = analysis.confusion.names, analysis.confusion.counts
    share = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 1.8 + max(2.0, (0.46 if len(names) <= _MOST_NUMBERS else 0.17) * len(names))
    figure, (axis,) = new_figure(1, 1, (side, side))
    axis.imshow(share, cmap="Blues", vmin=0, vmax=1)
    size = 8 if len(names) <= _MOST_NUMBERS else 5
    axis.set_xticks(range(len(names)), names, rotation=90, fontsize=size)
    axis.set_yticks(range(len(names)), names, fontsize=size)
    axis.set_xlim(-0.5, len(names) - 0.5)
    axis.set_ylim(len(names) - 0.5, -0.5)
    axis.set_xlabel("detected", color=INK)
    axis.set_ylabel("there", color=INK)
    axis.grid(visible=False)
    if len(names) <= _MOST_NUMBERS:
        for row, column in np.argwhere(counts > 0):
            ink = "white" if share[row, column] > 0.55 else INK
            axis.text(column, row, str(counts[row, column]), ha="center", va="center", fontsize=7, color=ink)
    axis.set_title(f"{title}: confusions", fontsize=10, color=INK)
    return save_figure(figure, path)


def new_figure(rows: int, columns: int, size: tuple[float, float]) -> tuple[Figure, list[Axes]]:
    """A figure without a window system, and its axes in reading order, each 0..1 both ways."""
    from matplotlib.figure import Figure  # slow to import

    figure = Figure(figsize=size, dpi=110, layout="constrained", facecolor="white")
    axes: list[Any] = list(np.ravel(figure.subplots(rows, columns, squeeze=False)))
    for axis in axes:
        axis.set(xlim=(0, 1), ylim=(0, 1.02))
        axis.tick_params(labelsize=7, colors=INK, length=2)
        axis.grid(visible=True, color=_GRID, linewidth=0.6)
        for spine in axis.spines.values():
            spine.set_color(_GRID)
    return figure, axes


def save_figure(figure: Figure, path: Path) -> Path:
    """Writes it as the path's ending says. Raises MtlRcnnError if the file cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path)
    except OSError as error:
        raise MtlRcnnError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path
