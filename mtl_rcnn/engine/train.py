"""A whole training run, from a composed configuration to metrics. `tools/train_net.py` and tests call `train`."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mtl_rcnn.config.durations import in_iterations
from mtl_rcnn.data.coverage import check_useful, label_table
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.repeat import repeat_report
from mtl_rcnn.engine import resume
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets, task_classes
from mtl_rcnn.engine.checkpoint import Checkpointer
from mtl_rcnn.engine.data import (
    batch_shares,
    epoch_length,
    evaluation_sets,
    train_datasets,
    train_loader,
    val_datasets,
)
from mtl_rcnn.engine.distributed import Ranks, broadcast_object
from mtl_rcnn.engine.early_stop import EarlyStop
from mtl_rcnn.engine.ema import WeightAverage
from mtl_rcnn.engine.failures import joined
from mtl_rcnn.engine.freeze import cache_features, freeze
from mtl_rcnn.engine.hooks import AnalysisHook, CheckpointHook, EvaluationHook, WriteHook
from mtl_rcnn.engine.on_the_way import evaluate_on_the_way, final_report
from mtl_rcnn.engine.preemption import EvaluationLeft, StopRequest, interruptible, stop_requests
from mtl_rcnn.engine.progress import JsonLinesWriter, ProgressWriter, TensorboardWriter, Writers
from mtl_rcnn.engine.report import write_labels
from mtl_rcnn.engine.run import open_run, versions
from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer
from mtl_rcnn.engine.startup import startup_report
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.task_analysis import check_analysis
from mtl_rcnn.engine.task_schedule import TaskSchedule
from mtl_rcnn.engine.trackers import build_trackers
from mtl_rcnn.engine.trainer import PRECISIONS, Trainer
from mtl_rcnn.errors import ConfigError, TrainingError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

logger = logging.getLogger(__name__)


@dataclass
class Outcome:
    """What a run leaves.

    Attributes:
        metrics: of the evaluation after the last iteration, by "dataset/task/metric"; the same on every rank.
        folder: the run's directory.
    """

    metrics: dict[str, Metric]
    folder: Path


def train(cfg: DictConfig) -> Outcome:
    """Trains, evaluates and checkpoints one run on all ranks, resuming if `output_dir` holds one.

    Raises:
        MtlRcnnError: anything the user can mend; the text says how.
        Preempted: told to stop; a checkpoint is written.
    """
    with stop_requests(cfg.preemption.repeat_s) as told:
        with joined(cfg) as ranks:
            cfg = broadcast_object(resolved(cfg))  # composed once: every rank has rank 0's run directory
            outcome = _train(cfg, ranks, told)
            # In here: the ranks leave together, and a launcher may kill rank 0, which requeues, once another has ended.
            end = None if outcome else told.end(Path(cfg.output_dir), ranks, cfg.preemption.requeue)
        if outcome is None:
            raise end
        return outcome


def _train(cfg: DictConfig, ranks: Ranks, told: StopRequest) -> Outcome | None:
    """None where the run was told to stop."""
    folder = open_run(cfg, ranks)
    datasets, label_space = train_datasets(cfg, ranks)
    per_epoch = epoch_length(cfg, datasets)
    cfg = in_iterations(cfg, per_epoch)
    targets = build_targets(cfg, label_space)
    table = label_table(datasets, targets)
    check_useful(table, datasets)
    if ranks.is_main:
        write_labels(folder, table)
    evaluated = val_datasets(cfg, label_space, ranks)
    sets = evaluation_sets(cfg, evaluated, label_space, ranks, targets, losses=cfg.solver.val_losses)
    task_schedule = TaskSchedule.from_config(cfg, sets)
    layout = torch.channels_last if cfg.model.channels_last else torch.contiguous_format
    model = build_model(cfg, label_space).to(ranks.device, memory_format=layout)
    freeze(model, cfg.solver.freeze)
    optimizer = build_optimizer(model, cfg.solver)
    checkpointer = Checkpointer.from_config(folder, cfg.checkpoint)
    start = resume.start(cfg, checkpointer, model, optimizer, label_space)
    cache_features(cfg, model)
    task_schedule.resume(start["task_schedule"])
    repeats = repeat_report(datasets, cfg.data.repeat_thresh, label_space.classes)
    shares = batch_shares(cfg, datasets)
    logger.info("%s", startup_report(cfg, table, model, ranks, per_epoch, repeats, shares))
    if task_schedule.describe():
        logger.info("task schedule:\n%s", task_schedule.describe())
    loader = train_loader(cfg, datasets, targets, start["iteration"], ranks)
    trainer = _trainer(cfg, model, optimizer, iter(loader), ranks, folder, label_space, start, task_schedule, told)
    sets = interruptible(sets, told, ranks.device)
    with _writers(cfg, folder, start, ranks) as writers, checkpointer, suppress(EvaluationLeft):
        return _run(cfg, trainer, writers, checkpointer, sets, label_space, start, folder, task_schedule)
    return None


def _run(
    cfg: DictConfig,
    trainer: Trainer,
    writers: Writers,
    checkpointer: Checkpointer,
    sets: list[EvaluationSet],
    label_space: LabelSpace,
    start: Mapping[str, Any],
    folder: Path,
    task_schedule: TaskSchedule,
) -> Outcome | None:
    evaluation: EvaluationHook | None = None
    early_stop = _early_stop(cfg, start["early_stop"])

    def state(iteration: int) -> dict[str, Any]:
        return {
            "iteration": iteration,
            "model": trainer.network.state_dict(),
            "optimizer": trainer.optimizer.state_dict(),
            "schedule": None,
            "scaler": trainer.scaler.state_dict() if trainer.scaler.is_enabled() else None,
            "balancing": trainer.balancer.state_dict(),
            "best": evaluation.best if evaluation else None,
            "label_space": label_space.state(),
            "config": OmegaConf.to_container(cfg, resolve=True),
            "versions": versions(),
            "ema": trainer.average.state_dict() if trainer.average else None,
            "early_stop": early_stop.state if early_stop else None,
            "task_schedule": task_schedule.state(),
            "evaluation_due": evaluation.due if evaluation else None,
            "rows": writers.rows,
        }

    evaluate_network = partial(evaluate_on_the_way, cfg, trainer, sets, label_space, folder, writers)
    hooks: list[Any] = [WriteHook(cfg.solver.log_period, writers), AnalysisHook(writers)]
    if sets:
        best_metric = cfg.solver.best_metric or _default_best_metric(sets)
        evaluation = EvaluationHook(
            cfg.solver.eval_period,
            evaluate_network,
            writers,
            checkpointer,
            state,
            best_metric,
            start["best"],
            early_stop,
            task_schedule,
            bool(start["evaluation_due"]),
        )
        hooks.append(evaluation)
    hooks.append(CheckpointHook(cfg.solver.checkpoint_period, checkpointer, state))
    trainer.register_hooks(hooks)
    over = early_stop is not None and early_stop.due  # it had ended early when it was resumed
    trainer.train(start["iteration"], start["iteration"] if over else task_schedule.end(start["iteration"]))
    if trainer.stopping:
        return None
    metrics = evaluation.metrics if evaluation else {}
    if evaluation and not metrics:  # resumed after its last iteration
        metrics = broadcast_object(dict(evaluate_network(start["iteration"])))
    if cfg.report.enabled and trainer.ranks.is_main:
        final_report(cfg, trainer, label_space, folder)
    check_expected(metrics, cfg.expected)
    return Outcome(dict(metrics), folder)


def resolved(cfg: DictConfig) -> DictConfig:
    """A copy without interpolations: the time in `output_dir` is that of its making."""
    return OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))


def check_expected(metrics: Mapping[str, Metric], expected: Mapping[str, Any]) -> None:
    """Compares metrics with `expected: {name: [value, tolerance]}`. Raises TrainingError naming those that fall
    short."""
    short = []
    for name, (value, tolerance) in expected.items():
        if name not in metrics:
            raise ConfigError(f"expected.{name}: no such metric; metrics are {', '.join(metrics)}")
        found = metrics[name]
        gap = value - found.value if found.higher_is_better else found.value - value
        if gap > tolerance:
            short.append(f"{name} is {found.value:.2f}, expected {value} within {tolerance}")
    if short:
        raise TrainingError("the run is complete but falls short of its expected metrics: " + "; ".join(short))


def _trainer(
    cfg: DictConfig,
    model: MultiTaskRCNN,
    optimizer: torch.optim.Optimizer,
    batches: Any,
    ranks: Ranks,
    folder: Path,
    label_space: LabelSpace,
    start: Mapping[str, Any],
    task_schedule: TaskSchedule,
    told: StopRequest,
) -> Trainer:
    if cfg.solver.precision not in PRECISIONS:
        raise ConfigError(f"solver.precision={cfg.solver.precision}: expected one of {', '.join(PRECISIONS)}")
    balancer = build_balancer(cfg, model, start["balancing"])
    share_gradients(balancer, model, ranks, cfg.solver)
    check_analysis(cfg.analysis.every, model)
    trainer = Trainer(
        distribute(model, ranks),
        balancer,
        optimizer,
        LrSchedule.from_config(cfg.solver),
        batches,
        ranks,
        PRECISIONS[cfg.solver.precision],
        cfg.solver.clip_gradients,
        Stopwatch(cfg.solver.batch_size, cfg.solver.max_iter, ranks.device),
        (folder / "failures", OmegaConf.to_container(cfg, resolve=True), label_space),
        cfg.solver.accumulate,
        _average(cfg, model, start["ema"]),
        cfg.seed if cfg.model.sampling == "keyed" else None,
        task_schedule,
        cfg.analysis.every,
        told,
    )
    if start["scaler"] is not None:
        trainer.scaler.load_state_dict(start["scaler"])
    return trainer


def _average(cfg: DictConfig, model: MultiTaskRCNN, state: Mapping[str, Any] | None) -> WeightAverage | None:
    """The average of the weights, if the configuration wants one, as a checkpoint left it."""
    if cfg.solver.ema is None:
        return None
    average = WeightAverage(model, cfg.solver.ema)
    if state is not None:
        average.load_state_dict(state, "the checkpoint's average (ema)")
    return average


def _early_stop(cfg: DictConfig, state: Mapping[str, Any] | None) -> EarlyStop | None:
    node = cfg.solver.early_stop
    return None if node.metric is None else EarlyStop(node.metric, node.patience, state)


def distribute(model: MultiTaskRCNN, ranks: Ranks) -> nn.Module:
    """The network in training mode, under DDP if there is more than one rank."""
    model.train()
    if ranks.world == 1:
        return model
    devices = [ranks.device] if ranks.device.type == "cuda" else None
    return nn.parallel.DistributedDataParallel(model, device_ids=devices, broadcast_buffers=True)


def _writers(cfg: DictConfig, folder: Path, start: Mapping[str, Any], ranks: Ranks) -> Writers:
    if not ranks.is_main:
        return Writers([])
    return Writers(
        [
            ProgressWriter(cfg.solver.max_iter, groups=task_classes(cfg)),
            JsonLinesWriter(folder / "metrics.jsonl", start["iteration"], start["rows"]),
            TensorboardWriter(folder / "tensorboard", start["iteration"]),
            *build_trackers(cfg, folder),
        ]
    )


def _default_best_metric(sets: list[EvaluationSet]) -> str:
    name, evaluator = next(iter(sets[0].evaluators.items()))
    return f"{sets[0].name}/{name}/{evaluator.headline}"
