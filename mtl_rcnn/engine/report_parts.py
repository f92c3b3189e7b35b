"""The parts of a run's report, each read from the files that the run left."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from mtl_rcnn.engine.progress import read_metrics as read_progress
from mtl_rcnn.engine.task_analysis import PREFIX as ANALYSIS
from mtl_rcnn.evaluation.analysis import analysis_path
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.visualize.charts import Series, line_chart
from mtl_rcnn.visualize.page import Chart, Errors, Table, embedded, heat_table

_Named = dict[str, Metric]

_CLASSES = 30
"""Rows of a confusion matrix."""
_CURVES = 24
_WORST = 12


def by_task(metrics: Mapping[str, Metric]) -> dict[tuple[str, str], _Named]:
    """(dataset, task) -> metric -> value, from "dataset/task/metric"."""
    groups: dict[tuple[str, str], _Named] = {}
    for key, metric in metrics.items():
        dataset, task, name = key.split("/", 2)
        groups.setdefault((dataset, task), {})[name] = metric
    return groups


def cards(groups: Mapping[tuple[str, str], _Named], headlines: Mapping[str, str]) -> list[dict[str, str]]:
    """The headline metric of each task on each dataset, and up to four more."""
    found = []
    for (dataset, task), named in groups.items():
        whole = {name: metric for name, metric in named.items() if "/" not in name}
        head = headlines.get(task) if headlines.get(task) in whole else next(iter(whole), None)
        if head is None:
            continue
        others = [name for name in whole if name != head and not name.startswith("loss")][:4]
        more = " · ".join(f"{name} {number(whole[name].value)}" for name in others)
        found.append({"name": f"{task} on {dataset}", "value": number(whole[head].value), "unit": head, "more": more})
    return found


def summaries(groups: Mapping[tuple[str, str], _Named]) -> list[Table]:
    """Metrics over all classes; tasks that have a metric in common share a table."""
    tables: list[dict[tuple[str, str], _Named]] = []
    for key, named in groups.items():
        whole = {name: metric for name, metric in named.items() if "/" not in name}
        home = next((table for table in tables if any(set(whole) & set(other) for other in table.values())), None)
        if home is None:
            tables.append({key: whole})
        else:
            home[key] = whole
    return [_table(["dataset", "task"], {key: (list(key), named) for key, named in table.items()}) for table in tables]


def per_class(groups: Mapping[tuple[str, str], _Named]) -> list[Table]:
    """One table per dataset and task that has metrics of classes."""
    tables = []
    for (dataset, task), named in groups.items():
        classes: dict[str, _Named] = {}
        for name, metric in named.items():
            if "/" in name:
                kind, class_name = name.split("/", 1)
                classes.setdefault(class_name, {})[kind] = metric
        if classes:
            rows = {name: ([name], values) for name, values in classes.items()}
            tables.append(_table(["class"], rows, f"{task} on {dataset}, per class"))
    return tables


def reasons(groups: Mapping[tuple[str, str], _Named]) -> list[str]:
    """Why metrics over all classes are what they are, where that was found out."""
    lines = {
        f"{dataset}/{task}: {metric.reason}": None
        for (dataset, task), named in groups.items()
        for name, metric in named.items()
        if metric.reason and "/" not in name
    }
    return list(lines)


def training_charts(path: Path, tasks: Sequence[str]) -> list[Chart]:
    """Losses by task, metrics by dataset, learning rate, gradient and speed over the iterations of a
    `metrics.jsonl`."""
    if not path.is_file():
        return []
    series = _series(read_progress(path, timings=True))
    charts = [_chart("total loss", {"total": series.get("total")}, log=True)]
    for task in tasks:
        parts = {name.split("/", 1)[1]: s for name, s in series.items() if name.startswith(f"{task}/")}
        validation = {
            f"{name.split('/')[0]} {name.rsplit('loss_', 1)[1]}": Series(s.name, s.x, s.y, dashed=True)
            for name, s in series.items()
            if f"/{task}/loss_" in name
        }
        charts.append(_chart(f"{task}: losses", {**parts, **validation}, log=True))
    charts += _metric_charts(series)
    charts += _gradient_charts(series, tasks)
    charts += [
        _chart("learning rate", {"lr": series.get("lr")}),
        _chart("gradient norm", {"grad_norm": series.get("grad_norm")}, log=True),
        _chart("images per second", {"img/s": series.get("time/img_per_s")}),
    ]
    return [chart for chart in charts if "<svg" in chart.svg]


def task_errors(folder: Path, dataset: str, task: str) -> Errors | None:
    """Confusions, curves and worst images of one task on one dataset; None if no table is there."""
    matrix, note = _matrix(analysis_path(folder, dataset, task, "confusion.csv"))
    curves, curves_note = _class_curves(analysis_path(folder, dataset, task, "curves.csv"))
    images = _read(analysis_path(folder, dataset, task, "images.csv"))
    sheet = analysis_path(folder, dataset, task, "worst.png")
    if not (matrix or curves or images):
        return None
    return Errors(
        f"{task} on {dataset}",
        matrix,
        note,
        curves,
        curves_note,
        _worst(images),
        embedded(cv2.cvtColor(cv2.imread(str(sheet)), cv2.COLOR_BGR2RGB)) if sheet.is_file() else None,
    )


def number(value: float) -> str:
    """Four figures."""
    return f"{value:.2f}" if abs(value) >= 10 or value == 0 else f"{value:.3f}"


def _table(
    first: Sequence[str], rows: Mapping[object, tuple[Sequence[str], Mapping[str, Metric]]], title: str = ""
) -> Table:
    """Rows of leading cells and metrics; "-" where a row lacks a metric, an arrow where less is better."""
    columns: dict[str, str] = {}
    for _, named in rows.values():
        for name, metric in named.items():
            columns.setdefault(name, name if metric.higher_is_better else f"{name} ↓")
    cells = [
        [*lead, *(number(named[name].value) if name in named else "-" for name in columns)]
        for lead, named in rows.values()
    ]
    return Table([*first, *columns.values()], cells, title)


def _series(rows: Sequence[Mapping[str, float]]) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for row in rows:
        for name, value in row.items():
            if name != "iteration" and value is not None:
                entry = found.setdefault(name, Series(name, [], []))
                entry.x.append(row["iteration"])
                entry.y.append(value)
    return found


def _metric_charts(series: Mapping[str, Series]) -> list[Chart]:
    """Every metric over all classes that was measured more than once, by dataset and metric, a line per task."""
    panels: dict[tuple[str, str], dict[str, Series]] = {}
    for name, entry in series.items():
        parts = name.split("/")
        measured = len(parts) == 3 and len(entry.x) > 1
        if measured and not parts[2].startswith("loss") and not name.startswith(ANALYSIS):
            panels.setdefault((parts[0], parts[2]), {})[parts[1]] = entry
    return [_chart(f"{metric} on {dataset}", lines) for (dataset, metric), lines in panels.items()]


def _gradient_charts(series: Mapping[str, Series], tasks: Sequence[str]) -> list[Chart]:
    """What an analysis of the tasks saw (`analysis.every`): gradient norms, and each task's cosines with the others."""
    norms = {task: series.get(f"{ANALYSIS}grad_norm/{task}") for task in tasks}
    charts = [_chart("gradient norms at the shared features", norms, log=True)]
    for task in tasks if len(tasks) > 2 else tasks[:1]:  # of two tasks there is one cosine
        cosines = {
            other: series.get(f"{ANALYSIS}cosine/{task}/{other}") or series.get(f"{ANALYSIS}cosine/{other}/{task}")
            for other in tasks
        }
        charts.append(_chart(f"cosine with the gradient of {task}", cosines))
    return charts


def _chart(title: str, lines: Mapping[str, Series | None], log: bool = False) -> Chart:
    named = [Series(name, s.x, s.y, s.dashed) for name, s in lines.items() if s is not None]
    return Chart(title, line_chart(named, log=log))


def _matrix(path: Path) -> tuple[dict | None, str]:
    rows = _read(path)
    if not rows:
        return None, ""
    names, counts = rows[0][1:], np.array([row[1:] for row in rows[1:]], dtype=np.int64)
    if len(names) <= _CLASSES + 1:
        return heat_table(names, counts), ""
    wrong = counts.sum(axis=1) + counts.sum(axis=0) - 2 * counts.diagonal()
    kept = [*sorted(np.argsort(-wrong[:-1], kind="stable")[:_CLASSES].tolist()), len(names) - 1]
    note = f" Shown are the {_CLASSES} classes with most errors of {len(names) - 1}; {path.name} has all."
    return heat_table([names[i] for i in kept], counts[np.ix_(kept, kept)]), note


def _class_curves(path: Path) -> tuple[list[Chart], str]:
    """The classes with the smallest area under the curve."""
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, recall, precision, _ in _read(path)[1:]:
        curves.setdefault(name, []).append((float(recall), float(precision)))
    area = {name: sum(p for _, p in points) / len(points) for name, points in curves.items()}
    worst = sorted(area, key=lambda name: area[name])[:_CURVES]
    charts = [
        Chart(
            f"{name}: AP50 {number(100 * area[name])}",
            line_chart([Series("precision", *zip(*curves[name]))], y_range=(0.0, 1.0), legend=False),
        )
        for name in worst
    ]
    return charts, "" if len(curves) <= _CURVES else f" with the lowest AP50 of {len(curves)}"


def _worst(images: Sequence[Sequence[str]]) -> Table | None:
    """The worst images that are not flawless: their F1, in the last column, is below 1."""
    return Table(images[0], [row for row in images[1:] if float(row[-1]) < 1][:_WORST]) if images else None


def _read(path: Path) -> list[list[str]]:
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.reader(file))
