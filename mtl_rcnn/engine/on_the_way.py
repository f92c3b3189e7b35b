"""What a training run does besides training: evaluations on the way, and the report at its end."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from omegaconf import DictConfig

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.distributed import share_buffers
from mtl_rcnn.engine.gallery import gallery_tiles, network_showcase
from mtl_rcnn.engine.inspection import Inspection
from mtl_rcnn.engine.progress import Writers
from mtl_rcnn.engine.report import write_report
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.engine.val_losses import validation_losses
from mtl_rcnn.engine.worst import draw_worst
from mtl_rcnn.errors import MtlRcnnError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet, evaluate
from mtl_rcnn.evaluation.report import report_text

logger = logging.getLogger(__name__)


def evaluate_on_the_way(
    cfg: DictConfig,
    trainer: Trainer,
    sets: Sequence[EvaluationSet],
    label_space: LabelSpace,
    folder: Path,
    writers: Writers,
    iteration: int,
) -> dict[str, Metric]:
    """Metrics, and validation losses where asked for, on rank 0, {} elsewhere; of the average where there is one.

    Rank 0 also leaves the tables of `evaluation.analysis` in `<folder>/evaluation`, pictures where they are wanted,
    and gives the writers sample images. Every rank must call this.
    """
    inspect = Inspection(folder / "evaluation", cfg, label_space, trainer.network, plots=cfg.evaluation.pictures)
    with trainer.average.applied() if trainer.average else nullcontext():
        share_buffers(trainer.network)
        metrics = evaluate(trainer.network, sets, folder, inspect=inspect, iteration=iteration)
        if trainer.ranks.is_main:
            _draw(cfg, inspect, writers, iteration)
        losses = validation_losses(trainer.network, sets, cfg.seed)
    if metrics:
        metrics |= losses
        logger.info("iteration %d\n%s", iteration, report_text(metrics))
    return metrics


def final_report(cfg: DictConfig, trainer: Trainer, label_space: LabelSpace, folder: Path) -> None:
    """Writes the run's report, on rank 0. One that fails is told, and is no reason to lose the run."""
    try:
        with trainer.average.applied() if trainer.average else nullcontext():
            show = network_showcase(trainer.network, cfg, label_space) if cfg.data.val else None
            path = write_report(folder, show, cfg.report.images, note="the run has no evaluation set")
        logger.info("report: %s", path)
    except MtlRcnnError as error:
        logger.warning("no report: %s", error)


def _draw(cfg: DictConfig, inspect: Inspection, writers: Writers, iteration: int) -> None:
    if cfg.evaluation.pictures:
        draw_worst(inspect, cfg.evaluation.worst_images)
    if cfg.evaluation.samples and inspect.network is not None:
        show = network_showcase(inspect.network, cfg, inspect.label_space)
        writers.write_images(iteration, dict(gallery_tiles(show, cfg.evaluation.samples)))
