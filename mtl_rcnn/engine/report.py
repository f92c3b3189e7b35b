"""A run as one HTML file: `<run>/report.html`, made at the end of a training and by tools/report.py."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.diff import ABSENT, config_diff
from mtl_rcnn.data.coverage import LabelRow, label_table
from mtl_rcnn.engine import report_parts as parts
from mtl_rcnn.engine.build import build_targets, task_classes
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.engine.distributed import choose_device
from mtl_rcnn.engine.gallery import Showcase, gallery_tiles, network_showcase
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.errors import CheckpointError, ConfigError, DataError, MtlRcnnError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.results import read_metrics, write_json, write_text
from mtl_rcnn.visualize.page import Page, Picture, Table, embedded, render

logger = logging.getLogger(__name__)

LABELS = "labels.json"
"""The label table of a run: what each of its training sets labels."""


def report_run(cfg: DictConfig) -> Path:
    """Makes the report of an existing run's folder (`configs/report.yaml`); returns its path.

    What is no longer there (data, checkpoints) is left out, and the page says so.

    Raises:
        ConfigError: the folder holds no run.
    """
    folder = Path(cfg.run)
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"run={folder}: no config.yaml in this folder; expected a run's output_dir")
    show, note = None, "no images asked for"
    if cfg.images:
        try:
            restored = restore(folder, choose_device(cfg.device))
            show = network_showcase(restored.model, restored.cfg, restored.label_space, cfg.score_threshold)
        except (CheckpointError, ConfigError) as error:
            note = f"no predictions: {error}"
    path = write_report(folder, show, cfg.images, cfg.score_threshold, note)
    print(f"wrote {path}")
    return path


def write_report(
    folder: Path,
    show: Showcase | None,
    images: int,
    threshold: float = 0.5,
    note: str = "",
) -> Path:
    """Writes `report.html` into a run's folder.

    Args:
        show: the run's network, for the gallery; None leaves it out, with the `note`.
        images: of the first evaluation set, for the gallery.
        threshold: least score that `show` draws.
    """
    cfg = OmegaConf.load(folder / "config.yaml")
    classes = task_classes(cfg)
    metrics, source = _newest_metrics(folder)
    groups = parts.by_task(metrics)
    headlines = {name: cls.evaluator_class.headline for name, cls in classes.items()}
    page = Page(f"{folder.resolve().name}: {', '.join(classes)}", _subtitle(cfg, source))
    page.cards = parts.cards(groups, headlines)
    page.reasons, page.summaries = parts.reasons(groups), parts.summaries(groups)
    page.per_class = parts.per_class(groups)
    page.charts = parts.training_charts(folder / "metrics.jsonl", list(classes))
    page.gallery, page.gallery_note = _gallery(show, images, threshold, note)
    found = [parts.task_errors(folder / "evaluation", dataset, task) for dataset, task in groups]
    page.errors = [entry for entry in found if entry is not None]
    page.labels, page.labels_note = _labels(folder, cfg)
    page.differences = _differences(cfg)
    page.config = OmegaConf.to_yaml(cfg)
    page.command = _text(folder / "command.txt")
    path = folder / "report.html"
    write_text(path, render(page))
    return path


def write_labels(folder: Path, table: Sequence[LabelRow]) -> None:
    """Keeps a run's label table for its report."""
    write_json(folder / LABELS, [asdict(row) for row in table])


def _subtitle(cfg: DictConfig, source: str) -> str:
    solver = cfg.solver
    sets = ", ".join(entry.name for entry in cfg.data.train)
    length = f"{solver.max_iter} iterations of {solver.batch_size} images"
    return f"trained on {sets} for {length}, {solver.precision}, seed {cfg.seed}. {source}"


def _newest_metrics(folder: Path) -> tuple[dict[str, Metric], str]:
    """Of the training's last evaluation or of tools/evaluate.py, whichever is newer; and which that is."""
    candidates = [path for path in (folder, folder / "evaluation") if (path / "metrics.json").is_file()]
    if not candidates:
        return {}, "Not evaluated."
    newest = max(candidates, key=lambda path: (path / "metrics.json").stat().st_mtime)
    name = "evaluation/metrics.json" if newest != folder else "metrics.json"
    evaluated = newest / "evaluated.json"
    iteration = json.loads(evaluated.read_text(encoding="utf-8"))["iteration"] if evaluated.is_file() else None
    after = "" if iteration is None else f", after {iteration} iterations"
    return read_metrics(newest), f"Metrics: {name}{after}."


def _gallery(show: Showcase | None, images: int, threshold: float, note: str) -> tuple[list[Picture], str]:
    if show is None or not images:
        return [], note or "no images asked for"
    try:
        tiles = gallery_tiles(show, images)
    except (DataError, ConfigError) as error:
        return [], f"no predictions: {error}"
    return [Picture(f"{title} (scores from {threshold:g} on)", embedded(rgb)) for title, rgb in tiles], ""


def _labels(folder: Path, cfg: DictConfig) -> tuple[Table | None, str]:
    path = folder / LABELS
    try:
        rows = _read_labels(path) if path.is_file() else _count_labels(cfg)
    except MtlRcnnError as error:
        return None, f"the label table was not kept, and the data cannot be read: {error}"
    header = ["dataset", "task", "images labelled", "images", "instances labelled", "instances"]
    cells = [
        [r.dataset, r.task, *map(str, (r.images_labelled, r.images, r.instances_labelled, r.instances))] for r in rows
    ]
    return Table(header, cells), ""


def _read_labels(path: Path) -> list[LabelRow]:
    return [LabelRow(**row) for row in json.loads(path.read_text(encoding="utf-8"))]


def _count_labels(cfg: DictConfig) -> list[LabelRow]:
    datasets, label_space = train_datasets(cfg)
    return label_table(datasets, build_targets(cfg, label_space))


def _differences(cfg: DictConfig) -> Table | None:
    def text(value: object) -> str:
        return "-" if value is ABSENT else str(value)

    found = config_diff(cfg)
    rows = [[d.key, text(d.default), text(d.value)] for d in found]
    return Table(["key", "default", "this run"], [[_cut(cell) for cell in row] for row in rows]) if rows else None


def _cut(text: str) -> str:
    return text if len(text) <= 90 else f"{text[:87]}..."


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else f"{path.name} is missing"
