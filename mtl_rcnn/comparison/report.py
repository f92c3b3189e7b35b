"""The files of a comparison: report.md, trainings.csv, deltas.svg and report.html."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping, Sequence
from datetime import date
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.comparison.cells import Result
from mtl_rcnn.comparison.plan import Cell
from mtl_rcnn.comparison.table import Row
from mtl_rcnn.comparison.words import csv_text, markdown, table, terms_table, verdicts
from mtl_rcnn.engine.distributed import choose_device
from mtl_rcnn.engine.gallery import gallery_tiles, network_showcase
from mtl_rcnn.engine.progress import read_metrics as read_progress
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.engine.run import versions
from mtl_rcnn.evaluation.results import write_text
from mtl_rcnn.visualize.charts import Series, interval_chart, line_chart
from mtl_rcnn.visualize.page import Chart, ComparisonPage, Picture, embedded, render

NOTE = (
    "delta_m is the mean over the tasks of (-1)^l (M - B) / B in percent, l = 1 where lower is better, B the mean of "
    "the task's own network: positive is better. A task on boxes has its own network together with the detector. "
    "± is one standard deviation over the seeds; a difference that is not larger is called noise. The time of a step "
    "is that of training without evaluation; ms per image are measured side by side, one image at a time."
)


def write_comparison(
    cfg: DictConfig,
    rows: Sequence[Row],
    metrics: Mapping[str, str],
    higher_is_better: Mapping[str, bool],
    cells: Sequence[Cell],
    results: Mapping[str, Result],
    folder: Path,
) -> Path:
    """Writes all files; returns the path of the page.

    Args:
        cfg: of the comparison.
        rows: with deltas, in the order of the networks.
        metrics, higher_is_better: by task.
        cells, results: of the complete trainings.
    """
    sentences = verdicts(rows, metrics)
    numbers, terms = table(rows, metrics, higher_is_better), terms_table(rows, metrics)
    deltas = [(row.network.title, row.delta_m.mean, row.delta_m.deviation) for row in rows if _is_shown(row)]
    chart = interval_chart(deltas) if deltas else ""
    origin = _origin(results)
    write_text(folder / "trainings.csv", csv_text(rows, metrics))
    if chart:
        write_text(folder / "deltas.svg", chart)
    subtitle = _subtitle(cfg, rows, results)
    picture = "![delta_m of the networks](deltas.svg)\n\n" if chart else ""
    points = "\n".join(f"- {line}" for line in sentences)
    write_text(
        folder / "report.md",
        f"# Comparison of {', '.join(metrics)}\n\n{subtitle}\n\n{points}\n\n{picture}{markdown(numbers)}\n\n"
        f"Terms of delta_m, in percent:\n\n{markdown(terms)}\n\n{NOTE}\n\n```\n{origin}\n```\n",
    )
    page = ComparisonPage(f"Comparison of {', '.join(metrics)}", subtitle, sentences, [NOTE], chart, numbers, terms)
    page.charts = _charts(rows, metrics, cells, cfg)
    page.gallery = _gallery(cfg, rows, cells) if cfg.images else []
    joint = next((row.network for row in rows if row.network.method is not None), rows[-1].network)
    page.config, page.command = OmegaConf.to_yaml(joint.cfg), origin
    path = folder / "report.html"
    write_text(path, render(page))
    return path


def _is_shown(row: Row) -> bool:
    return row.delta_m is not None and (row.network.own_of is None or row.network.method is not None)


def _subtitle(cfg: DictConfig, rows: Sequence[Row], results: Mapping[str, Result]) -> str:
    sets = ", ".join(entry.name for entry in cfg.data.train)
    lengths = sorted({result.iterations for result in results.values()})
    seeds = sorted({len(row.seeds) for row in rows})
    return (
        f"{len(rows)} networks, {_range(seeds)} seed{'' if seeds == [1] else 's'} each, trained on {sets} for "
        f"{_range(lengths)} iterations of {cfg.solver.batch_size} images; scored on {cfg.data.val[0].name}."
    )


def _range(values: Sequence[int]) -> str:
    return str(values[0]) if len(values) == 1 else f"{values[0]} to {values[-1]}"


def _charts(rows: Sequence[Row], metrics: Mapping[str, str], cells: Sequence[Cell], cfg: DictConfig) -> list[Chart]:
    """Of each task, its loss and its metric over the iterations, a line per network: means over the seeds."""
    logs = {cell.name: read_progress(cell.folder / "metrics.jsonl") for cell in cells}
    found = []
    for task, metric in metrics.items():
        losses, scores = [], []
        for row in rows:
            own = [logs[cell.name] for cell in cells if cell.network is row.network and task in row.network.tasks]
            losses.append(_mean_line(row.network.title, [_losses(log, task) for log in own]))
            key = f"{cfg.data.val[0].name}/{task}/{metric}"
            scores.append(
                _mean_line(row.network.title, [{r["iteration"]: r[key] for r in log if key in r} for log in own])
            )
        found.append(Chart(f"{task}: sum of its losses", line_chart([s for s in losses if s.x], log=True)))
        if any(len(series.x) > 1 for series in scores):
            found.append(Chart(f"{task}: {metric}", line_chart([s for s in scores if s.x])))
    return found


def _losses(log: Sequence[Mapping[str, float]], task: str) -> dict[int, float]:
    """Iteration -> sum of a task's losses."""
    found = {}
    for row in log:
        parts = [value for name, value in row.items() if name.startswith(f"{task}/") and value is not None]
        if parts:
            found[row["iteration"]] = sum(parts)
    return found


def _mean_line(name: str, lines: Sequence[Mapping[int, float]]) -> Series:
    """The mean of some lines, where all of them have a point."""
    common = sorted(set.intersection(*(set(line) for line in lines))) if lines else []
    return Series(name, common, [sum(line[x] for line in lines) / len(lines) for x in common])


def _gallery(cfg: DictConfig, rows: Sequence[Row], cells: Sequence[Cell]) -> list[Picture]:
    """The same images through the first training of each network that is not there for its method alone."""
    shown = [row for row in rows if row.network.method is None]
    shown += [row for row in rows if row.network.method is not None][:1]
    found: list[list[Picture]] = []
    for row in shown:
        restored = restore(next(c.folder for c in cells if c.network is row.network), choose_device(cfg.device))
        show = network_showcase(restored.model, restored.cfg, restored.label_space)
        tiles = gallery_tiles(show, cfg.images)
        found.append([Picture(f"{title}: {row.network.title}", embedded(rgb)) for title, rgb in tiles])
    return [picture for of_image in zip(*found) for picture in of_image]


def _origin(results: Mapping[str, Result]) -> str:
    code = sorted({result.code for result in results.values()})
    lines = [shlex.join(["python", *sys.argv]), f"code: {', '.join(code)}", f"written: {date.today().isoformat()}"]
    lines.append(f"machine: {_processor()}, {torch.get_num_threads()} threads by default")
    return "\n".join([*lines, *(f"{name}: {version}" for name, version in versions().items())])


def _processor() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return f"{names[0]}, {len(names)} processors seen" if names else platform.processor() or platform.machine()
