"""What happens between steps: the log, the analysis of the tasks, evaluation with the best checkpoint, checkpoints. In
this order, so that a checkpoint knows everything that was written before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Any

from detectron2.engine import HookBase

from mtl_rcnn.engine.checkpoint import Checkpointer
from mtl_rcnn.engine.distributed import broadcast_object
from mtl_rcnn.engine.early_stop import EarlyStop
from mtl_rcnn.engine.preemption import EvaluationLeft
from mtl_rcnn.engine.progress import UserScalars, Writers
from mtl_rcnn.engine.task_schedule import TaskSchedule
from mtl_rcnn.evaluation.evaluator import Metric, find_metric

logger = logging.getLogger(__name__)


class WriteHook(HookBase):
    """Writes the step's values every `period` iterations and after the last."""

    def __init__(self, period: int, writers: Writers) -> None:
        self.period, self.writers = period, writers

    def before_train(self) -> None:
        self.user_scalars = UserScalars(self.trainer.storage)

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if is_due(iteration, self.period, self.trainer.max_iter):
            scalars = {**self.trainer.scalars, **self.user_scalars.new()}
            self.writers.write(iteration, scalars, self.trainer.watch.timings(iteration))


class AnalysisHook(HookBase):
    """Writes what the trainer saw of the tasks' gradients and costs, where it looked."""

    def __init__(self, writers: Writers) -> None:
        self.writers = writers

    def after_step(self) -> None:
        analysis = self.trainer.analysis
        if analysis is not None:
            self.writers.write(self.trainer.iter + 1, analysis.scalars(), analysis.timings())


class EvaluationHook(HookBase):
    """Evaluates every `period` iterations and after the last, and keeps the best network.

    A run that is told to stop leaves an evaluation that is due to the run that resumes: `due` goes into the checkpoint.

    Args:
        period: iterations; 0 evaluates only after the last.
        evaluate: called with the iteration on every rank; metrics on rank 0, {} elsewhere.
        writers: take the metrics.
        checkpointer, state: save the best network; `state` is called with the iteration.
        best_metric: "dataset/task/metric", or None to keep no best.
        best: the best result so far, of the checkpoint that the run resumes from.
        early_stop: decides after each evaluation whether to go on.
        task_schedule: decides after each evaluation which tasks go on; the run ends when none does.
        due: whether the checkpoint that the run resumes from was written before its iteration was evaluated.
    """

    def __init__(
        self,
        period: int,
        evaluate: Callable[[int], Mapping[str, Metric]],
        writers: Writers,
        checkpointer: Checkpointer,
        state: Callable[[int], dict[str, Any]],
        best_metric: str | None,
        best: dict[str, Any] | None,
        early_stop: EarlyStop | None = None,
        task_schedule: TaskSchedule | None = None,
        due: bool = False,
    ) -> None:
        self.period, self.evaluate, self.writers = period, evaluate, writers
        self.checkpointer, self.state, self.best_metric, self.best = checkpointer, state, best_metric, best
        self.early_stop, self.task_schedule, self.due = early_stop, task_schedule, due
        self.metrics: dict[str, Metric] = {}

    def before_train(self) -> None:
        if self.due:
            iteration = self.trainer.iter
            self._evaluate(iteration)
            self.checkpointer.save(iteration, self.state(iteration))

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        if is_due(iteration, self.period, self.trainer.max_iter):
            self.due = True
            if iteration == self.trainer.max_iter:  # what fails from here on does not cost the training
                self.checkpointer.save(iteration, self.state(iteration))
            if not self.trainer.stopping:
                self._evaluate(iteration)

    def _evaluate(self, iteration: int) -> None:
        try:
            self.metrics = broadcast_object(dict(self.evaluate(iteration)))
        except EvaluationLeft:
            self.trainer.stopping = True
            return
        self.due = False
        self.writers.write(iteration, {name: metric.value for name, metric in self.metrics.items()}, {})
        if self.early_stop is not None:
            self.early_stop.update(self.metrics, iteration)
            if self.early_stop.due:
                logger.info("early stop after iteration %d: %s", iteration, self.early_stop.reason())
                self.trainer.max_iter = iteration  # hooks after this one see the last iteration
        if self.task_schedule is not None:
            better = self.task_schedule.update(self.metrics, iteration)
            self.trainer.max_iter = min(self.trainer.max_iter, self.task_schedule.end(iteration))
            for task, best in better.items():
                self.checkpointer.save_best(self.state(iteration), best, task)
        if self.best_metric is not None and self._is_best(iteration):
            self.checkpointer.save_best(self.state(iteration), self.best)

    def _is_best(self, iteration: int) -> bool:
        metric = find_metric(self.metrics, self.best_metric, "solver.best_metric")
        found = {"metric": self.best_metric, "value": metric.value, "iteration": iteration}
        comparable = self.best is not None and self.best["metric"] == self.best_metric
        if comparable and not metric.better_than(self.best["value"]):
            return False
        self.best = found
        return True


class CheckpointHook(HookBase):
    """Saves a checkpoint every `period` iterations, where the checkpointer keeps one for good, after the last, and when
    the run is told to stop."""

    def __init__(self, period: int, checkpointer: Checkpointer, state: Callable[[int], dict[str, Any]]) -> None:
        self.period, self.checkpointer, self.state = period, checkpointer, state

    def after_step(self) -> None:
        iteration = self.trainer.iter + 1
        due = is_due(iteration, self.period, self.trainer.max_iter) or self.checkpointer.keeps(iteration)
        if due or self.trainer.stopping:
            self.checkpointer.save(iteration, self.state(iteration))


def is_due(iteration: int, period: int, last: int) -> bool:
    """Whether something that happens every `period` iterations (0: never) and at the last happens at `iteration`."""
    return iteration == last or (period > 0 and iteration % period == 0)
