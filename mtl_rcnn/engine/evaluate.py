"""Evaluates a trained network, or results files, from a configuration. `tools/evaluate.py` and tests call it."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig

from mtl_rcnn.engine.data import build_views, evaluation_sets, val_datasets
from mtl_rcnn.engine.distributed import Ranks, distributed, fail_together
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet, evaluate
from mtl_rcnn.evaluation.report import report_text
from mtl_rcnn.evaluation.results import evaluate_rows, write_metrics
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.views import MultiViewNetwork

logger = logging.getLogger(__name__)


def evaluate_checkpoint(cfg: DictConfig) -> dict[str, Metric]:
    """Metrics "dataset/task/metric" on rank 0, {} elsewhere; written to the output directory and printed.

    Raises:
        MtlRcnnError: a checkpoint, data set or results file that cannot be read; a task the network does not have.
    """
    with distributed(cfg.device) as ranks, fail_together(ranks):
        setup_logging(None, ranks)
        restored = restore(cfg.run, ranks.device, cfg.checkpoint)
        run_cfg = restored.cfg
        run_cfg.data.workers = cfg.workers
        if cfg.val is not None:
            run_cfg.data.val = cfg.val
        views = build_views(run_cfg, cfg.tta)
        datasets = val_datasets(run_cfg, restored.label_space)
        sets = evaluation_sets(run_cfg, datasets, restored.label_space, ranks, views=views)
        if not sets:
            raise ConfigError("val: the run has no evaluation set of its own; give one, as data.val of a training run")
        folder = Path(cfg.output_dir) if cfg.output_dir else restored.path.parent / "evaluation"
        logger.info("%s, trained for %d iterations", restored.path, restored.iteration)
        network = restored.model if views is None else MultiViewNetwork(InferenceNetwork(restored.model))
        metrics = _score_files(cfg, sets, folder, ranks) if cfg.results else evaluate(network, sets, folder)
        if metrics:
            logger.info("%s", report_text(metrics))
        return metrics


def _score_files(cfg: DictConfig, sets: list[EvaluationSet], folder: Path, ranks: Ranks) -> dict[str, Metric]:
    if len(sets) != 1:
        raise ConfigError(
            f"results: files belong to one data set, but the run evaluates on {len(sets)}; name it with val"
        )
    if not ranks.is_main:
        return {}
    metrics: dict[str, Metric] = {}
    for task, path in cfg.results.items():
        if task not in sets[0].evaluators:
            raise ConfigError(f"results.{task}: the network's tasks are {', '.join(sets[0].evaluators)}")
        scored = evaluate_rows(sets[0].evaluators[task], Path(path))
        metrics |= {f"{sets[0].name}/{task}/{name}": metric for name, metric in scored.items()}
    write_metrics(folder, metrics)
    return metrics
