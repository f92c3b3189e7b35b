"""A whole comparison: the plan, the trainings, the report. `tools/compare_tasks.py` calls `compare_tasks`."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from omegaconf import DictConfig

from mtl_rcnn.comparison.cells import Result, is_complete, read_result, train_cells
from mtl_rcnn.comparison.costs import measure_costs
from mtl_rcnn.comparison.plan import Cell, Network, plan_cells, plan_networks
from mtl_rcnn.comparison.report import write_comparison
from mtl_rcnn.comparison.table import Row, Spread, with_deltas
from mtl_rcnn.config.compose import Composition
from mtl_rcnn.engine.build import task_classes
from mtl_rcnn.engine.distributed import Ranks, choose_device
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.errors import ConfigError, TrainingError
from mtl_rcnn.evaluation.evaluator import find_metric

logger = logging.getLogger(__name__)


def compare_tasks(composition: Composition) -> Path:
    """Trains what is missing and writes the report of what is complete; returns the folder.

    Args:
        composition: of `configs/compare.yaml`.

    Raises:
        ConfigError: there is nothing to compare, or the folder holds a comparison with other settings.
        TrainingError: a training failed, after all others and the report.
    """
    cfg = composition.checked()
    if not cfg.data.val:
        raise ConfigError("data.val=[]: a comparison needs an evaluation set")
    folder = Path(cfg.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    setup_logging(folder, Ranks(0, 1, 0, torch.device("cpu")))
    networks = plan_networks(composition)
    cells = plan_cells(networks, cfg.seeds, folder)
    failures = train_cells(cells, folder, list(cfg.launch))
    complete = [cell for cell in cells if is_complete(cell)]
    if complete:
        _report(cfg, networks, complete, folder)
    if failures:
        lines = "\n  ".join(failures)
        raise TrainingError(f"{len(complete)} of {len(cells)} trainings are complete; these failed:\n  {lines}")
    if len(complete) < len(cells):
        logger.info("other processes train %d more: the last of them reports on all", len(cells) - len(complete))
    return folder


def _report(cfg: DictConfig, networks: Sequence[Network], cells: Sequence[Cell], folder: Path) -> None:
    results = {cell.name: read_result(cell) for cell in cells}
    first = {task: results[cell.name] for cell in reversed(cells) for task in cell.network.tasks}
    metrics = {task: metric for task, metric in metric_names(cfg, networks).items() if task in first}
    directions = {task: _more_is_better(cfg, task, metric, first[task]) for task, metric in metrics.items()}
    rows = [_row(cfg, network, cells, results, metrics) for network in networks]
    rows = _with_costs([row for row in rows if row is not None], cells, choose_device(cfg.device))
    path = write_comparison(cfg, with_deltas(rows, directions), metrics, directions, cells, results, folder)
    logger.info("report: %s", path)


def metric_names(cfg: DictConfig, networks: Sequence[Network]) -> dict[str, str]:
    """Task -> the metric that stands for it. Raises ConfigError if `metrics` names another task."""
    classes = task_classes(networks[-1].cfg)
    for task in cfg.metrics:
        if task not in classes:
            raise ConfigError(f"metrics.{task}: no such task; tasks are {', '.join(classes)}")
    return {name: str(cfg.metrics.get(name, cls.evaluator_class.headline)) for name, cls in classes.items()}


def _more_is_better(cfg: DictConfig, task: str, metric: str, result: Result) -> bool:
    """Of a task's metric, which a result must have."""
    return find_metric(result.metrics, _key(cfg, task, metric), f"metrics.{task}").higher_is_better


def _key(cfg: DictConfig, task: str, metric: str) -> str:
    return f"{cfg.data.val[0].name}/{task}/{metric}"


def _row(
    cfg: DictConfig,
    network: Network,
    cells: Sequence[Cell],
    results: Mapping[str, Result],
    metrics: Mapping[str, str],
) -> Row | None:
    """A network's line, of its complete trainings; None if it has none."""
    own = [cell for cell in cells if cell.network is network]
    if not own:
        return None
    found = [results[cell.name] for cell in own]
    scores = {
        task: Spread(tuple(result.metrics[_key(cfg, task, metrics[task])].value for result in found))
        for task in network.tasks
    }
    seeds = tuple(cell.seed for cell in own)
    return Row(network, seeds, scores, Spread(tuple(result.step_seconds for result in found)))


def _with_costs(rows: Sequence[Row], cells: Sequence[Cell], device: torch.device) -> list[Row]:
    """Measured on the first complete training of each network, all side by side."""
    folders = {row.network.name: next(c.folder for c in cells if c.network is row.network) for row in rows}
    costs = measure_costs(folders, device)
    return [
        replace(row, parameters=costs[name].parameters, inference_ms=costs[name].inference_ms)
        for name, row in zip(folders, rows)
    ]
