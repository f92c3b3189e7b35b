"""Says of a checkpoint which tasks' gradients agree or conflict. `tools/analyze_tasks.py` and tests call it.

In the output directory:
    report.txt      what is printed
    cosines.csv     a row per pair of tasks: verdict, mean cosine, 95 % interval, batches
    cosines.png     the same as a heat map
    gradients.csv   a row per batch: gradient norms and cosines, empty where a task has no gradient
    curves.png      norms and cosines over the training, if its log has them (`analysis.every`)
"""

from __future__ import annotations

import csv
import io
import logging
import math
import statistics
from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tabulate import tabulate

from mtl_rcnn.balancing import WeightedSum
from mtl_rcnn.data.loader import Loader
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.failures import joined
from mtl_rcnn.engine.losses import faulty_parts, reduce_losses
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.engine.run import repeatable, setup_logging
from mtl_rcnn.engine.task_analysis import PREFIX, TRUNK, TaskAnalysis, observed
from mtl_rcnn.engine.trainer import unchanged_buffers
from mtl_rcnn.engine.weights import check_label_space
from mtl_rcnn.errors import ConfigError, DataError, TrainingError
from mtl_rcnn.evaluation.agreement import Pair, cell, cosine_rows, judge, sentences
from mtl_rcnn.evaluation.progress import Progress
from mtl_rcnn.evaluation.results import write_text
from mtl_rcnn.visualize.charts import Series
from mtl_rcnn.visualize.task_plots import draw_cosines, draw_task_curves

logger = logging.getLogger(__name__)


def analyze_tasks(cfg: DictConfig) -> list[Pair]:
    """Every pair of tasks, on every rank; rank 0 writes the files (see the module) and prints the report.

    Batches are the first of the run's training, whatever the checkpoint, so that checkpoints of a run compare. The
    network is in training mode, in float32; neither its weights nor the statistics of its norms change.

    Raises:
        MtlRcnnError: a checkpoint or data that cannot be read; a network of one task; data that label no two tasks in
            any batch; a loss that is not finite.
    """
    with joined(cfg) as ranks:
        setup_logging(None, ranks)
        repeatable(ranks.device)
        restored = restore(cfg.run, ranks.device, cfg.checkpoint)
        tasks = [task.name for task in restored.model.tasks()]
        if len(tasks) < 2:
            raise ConfigError(f"run={cfg.run}: the network has one task, {tasks[0]}; there is no pair to compare")
        loader = _loader(restored, cfg, ranks)
        batches = list(_analyses(restored, loader, cfg.batches, ranks))
        pairs = judge(tasks, [batch.cosines for batch in batches])
        if not any(pair.batches for pair in pairs):
            raise DataError(
                f"run={cfg.run}: two tasks have a gradient in none of {len(batches)} batches; look at what "
                "data.train of the run labels (tools/check_data.py), or at more batches (batches=...)"
            )
        if ranks.is_main:
            folder = Path(cfg.output_dir) if cfg.output_dir else restored.path.parent / "task_analysis"
            _write(folder, restored, pairs, batches)
        return pairs


def _loader(restored: Restored, cfg: DictConfig, ranks: Ranks) -> Loader:
    """The batches of the run's training, from its start."""
    run_cfg = restored.cfg
    run_cfg.data.workers = cfg.workers
    run_cfg.solver.accumulate = 1
    if cfg.images_per_batch is not None:
        run_cfg.solver.batch_size = cfg.images_per_batch
    datasets, label_space = train_datasets(run_cfg, ranks)
    check_label_space(restored.label_space.state(), label_space, str(restored.path))
    return train_loader(run_cfg, datasets, build_targets(run_cfg, label_space), 0, ranks)


def _analyses(restored: Restored, loader: Loader, number: int, ranks: Ranks) -> Iterator[TaskAnalysis]:
    model, run_cfg = restored.model.train(), restored.cfg
    model.backbone.requires_grad_(True)  # features have gradients even where nothing of the trunk learns
    weights = WeightedSum(model.loss_names(), run_cfg.balancing.get("weights")).weights()
    total = number * run_cfg.solver.batch_size
    with Progress("analysing the tasks", total, enabled=ranks.is_main) as progress, unchanged_buffers(model):
        for index, samples in zip(range(number), loader):
            torch.manual_seed(run_cfg.seed + index)
            with observed(model) as observation:
                sums, _ = model(samples)
            if faults := faulty_parts(sums):
                images = ", ".join(f"{sample['dataset']}/{sample['image_id']}" for sample in samples)
                raise TrainingError(f"{restored.path}: the loss is not finite: {', '.join(faults)}; images: {images}")
            yield observation.analyse(sums, reduce_losses(sums, samples, ranks), weights, ranks)
            progress.advance(run_cfg.solver.batch_size)


def logged(path: Path) -> tuple[dict[str, Series], dict[tuple[str, str], Series]]:
    """Gradient norms by task, and cosines by pair, over the iterations of a `metrics.jsonl`; both empty if it has none.

    Raises:
        TrainingError: the file holds something else.
    """
    found: dict[str, Series] = {}
    for row in read_metrics(path):
        for name, value in row.items():
            if name.startswith(PREFIX) and value is not None:
                series = found.setdefault(name.removeprefix(PREFIX), Series(name, [], []))
                series.x.append(row["iteration"])
                series.y.append(value)
    kinds = {name: name.split("/") for name in found}
    norms = {words[1]: found[name] for name, words in kinds.items() if words[0] == "grad_norm"}
    return norms, {(words[1], words[2]): found[name] for name, words in kinds.items() if words[0] == "cosine"}


def _write(folder: Path, restored: Restored, pairs: Sequence[Pair], batches: Sequence[TaskAnalysis]) -> None:
    tasks = [task.name for task in restored.model.tasks()]
    report = _report(tasks, restored, pairs, batches)
    write_text(folder / "report.txt", report)
    _write_csv(folder / "cosines.csv", cosine_rows(pairs))
    _write_csv(folder / "gradients.csv", _gradient_rows(tasks, batches))
    title = f"mean cosine of the tasks' gradients at the shared features, {len(batches)} batches"
    draw_cosines(folder / "cosines.png", tasks, pairs, title)
    log = restored.path.parent / "metrics.jsonl"
    norms, cosines = logged(log) if log.is_file() else ({}, {})
    if norms:
        draw_task_curves(folder / "curves.png", tasks, norms, cosines, "the tasks' gradients during the training")
    logger.info("%s", report)
    logger.info("wrote %s%s", folder, "" if norms else "; no curves, as the run was trained without analysis.every")


def _report(tasks: Sequence[str], restored: Restored, pairs: Sequence[Pair], batches: Sequence[TaskAnalysis]) -> str:
    solver = restored.cfg.solver
    left_out = sum(not batch.finite for batch in batches)
    lines = [
        f"{restored.path}, trained for {restored.iteration} iterations: gradients of the tasks' losses at the shared "
        f"features, in {len(batches)} batches of {solver.batch_size} training images",
        *([f"{left_out} batches are left out, in which a gradient is not finite"] if left_out else []),
        "",
        *sentences(pairs, len(batches)),
        "",
        _costs(tasks, batches),
    ]
    return "\n".join(lines) + "\n"


def _costs(tasks: Sequence[str], batches: Sequence[TaskAnalysis]) -> str:
    """A table of medians over the batches; "-" where there is nothing."""

    def median(found: Sequence[Mapping[str, float]], part: str) -> str:
        values = [own[part] for own in found if part in own]
        return f"{statistics.median(values):.3g}" if values else "-"

    columns = {
        "gradient norm": [batch.norms for batch in batches],
        "forward ms": [batch.forward_ms for batch in batches],
        "backward ms": [batch.backward_ms for batch in batches],
        "MiB kept": [batch.saved_mib for batch in batches],
    }
    rows = [[part, *(median(found, part) for found in columns.values())] for part in (TRUNK, *tasks)]
    return tabulate(rows, ["medians", *columns], colalign=("left", *["right"] * len(columns)), disable_numparse=True)


def _gradient_rows(tasks: Sequence[str], batches: Sequence[TaskAnalysis]) -> list[list[str]]:
    pairs = list(combinations(tasks, 2))
    header = ["batch", *(f"grad_norm/{task}" for task in tasks), *(f"cosine/{a}/{b}" for a, b in pairs)]
    rows = [
        [str(number), *(_cell(batch.norms, task) for task in tasks), *(_cell(batch.cosines, pair) for pair in pairs)]
        for number, batch in enumerate(batches, 1)
    ]
    return [header, *rows]


def _cell(found: Mapping[Any, float], key: Any) -> str:
    return cell(found.get(key, math.nan))


def _write_csv(path: Path, rows: Sequence[Sequence[str]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_text(path, text.getvalue())
