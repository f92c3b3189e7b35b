"""Evaluates a trained network, or results files, from a configuration. `tools/evaluate.py` and tests call it."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.keys import nearest
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import build_views, evaluation_sets, val_datasets
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.failures import joined
from mtl_rcnn.engine.inspection import Inspection
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.engine.worst import draw_worst
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet, evaluate, score_task
from mtl_rcnn.evaluation.report import report_text
from mtl_rcnn.evaluation.results import read_rows, write_metrics
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.views import MultiViewNetwork

logger = logging.getLogger(__name__)


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, Metric]:
    """Metrics "dataset/task/metric" on rank 0, {} elsewhere; written to the output directory and printed.

    Raises:
        MtlRcnnError: a checkpoint, data set or results file that cannot be read; a task or a class the network does
            not have.
    """
    with joined(cfg) as ranks:
        setup_logging(None, ranks)
        restored = restore(cfg.run, ranks.device, cfg.checkpoint)
        _adapt(restored.cfg, cfg)
        views = build_views(restored.cfg, cfg.tta)
        datasets = val_datasets(restored.cfg, restored.label_space, ranks)
        targets = build_targets(restored.cfg, restored.label_space)
        sets = evaluation_sets(restored.cfg, datasets, restored.label_space, ranks, targets, views=views)
        if not sets:
            raise ConfigError("val: the run has no evaluation set of its own; give one, as data.val of a training run")
        folder = Path(cfg.output_dir) if cfg.output_dir else restored.path.parent / "evaluation"
        logger.info("%s, trained for %d iterations", restored.path, restored.iteration)
        score = _score_files if cfg.results else _score_network
        metrics = score(cfg, restored, sets, folder, ranks)
        if metrics:
            logger.info("%s", report_text(metrics))
        return metrics


def _adapt(run_cfg: DictConfig, cfg: DictConfig) -> None:
    """Puts what the command line changes into the run's configuration."""
    run_cfg.data.workers = cfg.workers
    if cfg.val is not None:
        run_cfg.data.val = cfg.val
    if cfg.classes is not None:
        OmegaConf.update(run_cfg, "evaluation.classes", cfg.classes, force_add=True)


def _score_network(
    cfg: DictConfig, restored: Restored, sets: list[EvaluationSet], folder: Path, ranks: Ranks
) -> dict[str, Metric]:
    inspect = Inspection(folder, restored.cfg, restored.label_space, restored.model, plots=cfg.pictures)
    many = build_views(restored.cfg, cfg.tta) is not None
    network = MultiViewNetwork(InferenceNetwork(restored.model)) if many else restored.model
    metrics = evaluate(network, sets, folder, inspect=inspect, iteration=restored.iteration)
    if cfg.pictures and ranks.is_main:
        draw_worst(inspect, cfg.worst_images)
    return metrics


def _score_files(
    cfg: DictConfig, restored: Restored, sets: list[EvaluationSet], folder: Path, ranks: Ranks
) -> dict[str, Metric]:
    if len(sets) != 1:
        raise ConfigError(
            f"results: files belong to one data set, but the run evaluates on {len(sets)}; name it with val"
        )
    if not ranks.is_main:
        return {}
    inspect = Inspection(folder, restored.cfg, restored.label_space, plots=cfg.pictures)
    metrics: dict[str, Metric] = {}
    for task, path in cfg.results.items():
        metrics |= _score_file(task, Path(path), sets[0], inspect)
    write_metrics(folder, metrics)
    return metrics


def _score_file(task: str, path: Path, entry: EvaluationSet, inspect: Inspection) -> dict[str, Metric]:
    if task not in entry.evaluators:
        close = nearest(task, list(entry.evaluators))
        hint = f"did you mean '{close}'? " if close else ""
        raise ConfigError(f"results.{task}: {hint}the network's tasks are {', '.join(entry.evaluators)}")
    rows = read_rows(path, entry.evaluators[task])
    try:
        return score_task(entry, task, rows, inspect)
    except DataError as error:
        raise DataError(f"{path}: {error}") from error
