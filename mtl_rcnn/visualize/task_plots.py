"""Figures of how the tasks' gradients agree."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mtl_rcnn.evaluation.agreement import AGREE, CONFLICT, Pair
from mtl_rcnn.visualize.charts import Series
from mtl_rcnn.visualize.plots import INK, new_figure, save_figure

if TYPE_CHECKING:
    from matplotlib.axes import Axes

_CELLS = "PuOr"
_WINDOWS = 10
"""Thick curves are means over a window of this part of the values."""


def draw_cosines(path: Path, tasks: Sequence[str], pairs: Sequence[Pair], title: str) -> Path:
    """A heat map: each pair's mean cosine, with its interval; in bold where that leaves out 0.

    Args:
        tasks: names, in slot order.

    Raises:
        MtlRcnnError: the file cannot be written.
    """
    values = np.full((len(tasks), len(tasks)), np.nan)
    for pair in pairs:
        places = tasks.index(pair.first), tasks.index(pair.second)
        values[places] = values[places[::-1]] = pair.mean
    largest = float(np.nanmax(np.abs(values), initial=0.01))
    figure, (axis,) = new_figure(1, 1, (3.2 + 0.95 * len(tasks), 1.6 + 0.75 * len(tasks)))
    axis.set_facecolor("#f1f3f5")
    image = axis.imshow(values, cmap=_CELLS, vmin=-largest, vmax=largest, aspect="auto")
    for pair in pairs:
        for row, column in ((pair.first, pair.second), (pair.second, pair.first)):
            _write_pair(axis, pair, tasks.index(row), tasks.index(column), largest)
    axis.set_xticks(range(len(tasks)), tasks, rotation=35, ha="right", fontsize=8)
    axis.set_yticks(range(len(tasks)), tasks, fontsize=8)
    axis.set(xlim=(-0.5, len(tasks) - 0.5), ylim=(len(tasks) - 0.5, -0.5))
    axis.grid(visible=False)
    bar = figure.colorbar(image, ax=axis, shrink=0.8)
    bar.set_label(
        "conflict   \N{LEFTWARDS ARROW}   mean cosine   \N{RIGHTWARDS ARROW}   agreement", fontsize=8, color=INK
    )
    bar.ax.tick_params(labelsize=7)
    axis.set_title(f"{title}\nbelow: 95 % interval; bold: it leaves out 0", fontsize=9, color=INK)
    return save_figure(figure, path)


def draw_task_curves(
    path: Path,
    tasks: Sequence[str],
    norms: Mapping[str, Series],
    cosines: Mapping[tuple[str, str], Series],
    title: str,
) -> Path:
    """Over the iterations of a training, a panel with every task's gradient norm, and one per task with its cosines
    with the others. Thin lines are the values, thick ones means of a window.

    Args:
        tasks: names, in slot order.
        norms: task -> values.
        cosines: (task, later task) -> values.

    Raises:
        MtlRcnnError: the file cannot be written.
    """
    colours = {task: f"C{place}" for place, task in enumerate(tasks)}
    centres = tasks if len(tasks) > 2 else tasks[:1]  # of two tasks there is one cosine
    columns = min(3, 1 + len(centres))
    rows = math.ceil((1 + len(centres)) / columns)
    figure, axes = new_figure(rows, columns, (4.2 * columns, 2.7 * rows + 0.4))
    for task, series in norms.items():
        _draw_curve(axes[0], series, colours[task])
    axes[0].set_yscale("log")
    axes[0].tick_params(which="minor", labelsize=7)
    axes[0].set_title("gradient norm at the shared features", fontsize=8, color=INK)
    for axis, centre in zip(axes[1:], centres):
        for (first, second), series in cosines.items():
            if centre in (first, second):
                _draw_curve(axis, series, colours[second if centre == first else first])
        axis.axhline(0, color=INK, linewidth=0.8)
        axis.set_title(f"cosine with {centre}", fontsize=8, color=INK)
    for axis in axes:
        axis.autoscale()
        axis.set_xlabel("iteration", fontsize=7, color=INK)
    for axis in axes[1 + len(centres) :]:
        axis.set_axis_off()
    handles = [axes[0].plot([], [], color=colour, linewidth=2, label=task)[0] for task, colour in colours.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=min(8, len(tasks)), fontsize=8, frameon=False)
    figure.suptitle(title, fontsize=10, color=INK)
    return save_figure(figure, path)


def _write_pair(axis: Axes, pair: Pair, row: int, column: int, largest: float) -> None:
    if math.isnan(pair.mean):
        axis.text(column, row, "no batch", ha="center", va="center", fontsize=7, color=INK)
        return
    ink = "white" if abs(pair.mean) > 0.65 * largest else INK
    weight = "bold" if pair.verdict in (CONFLICT, AGREE) else "normal"
    interval = f"{pair.batches} batches" if math.isnan(pair.low) else f"[{_short(pair.low)}, {_short(pair.high)}]"
    axis.text(column, row - 0.14, _short(pair.mean), ha="center", va="center", fontsize=9, color=ink, weight=weight)
    axis.text(column, row + 0.22, interval, ha="center", va="center", fontsize=6, color=ink)


def _short(value: float) -> str:
    return f"{round(value, 3) + 0.0:.3f}"  # no -0.000


def _draw_curve(axis: Axes, series: Series, colour: str) -> None:
    width = max(1, len(series.y) // _WINDOWS)
    window = np.ones(width) / width
    axis.plot(series.x, series.y, color=colour, linewidth=0.6, alpha=0.3)
    means = [np.convolve(values, window, "valid") for values in (series.x, series.y)]
    axis.plot(*means, color=colour, linewidth=1.6)
