"""Which tasks train when: what is planned for them (docs/adr/0017), and which have stopped early."""

from __future__ import annotations

import logging
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig

from mtl_rcnn.config.task_plans import KEY, TaskPlan, task_plans, training
from mtl_rcnn.engine.early_stop import EarlyStop
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet

logger = logging.getLogger(__name__)


class TaskSchedule:
    """The weight of every task at an iteration; a task of weight 0 rests.

    Args:
        plans: of every task of the network.
        max_iter: iterations of the whole training.
        early_stops: of the tasks that may stop early.
    """

    def __init__(
        self, plans: Mapping[str, TaskPlan], max_iter: int, early_stops: Mapping[str, EarlyStop] | None = None
    ) -> None:
        self.plans, self.max_iter = dict(plans), max_iter
        self.early_stops = dict(early_stops or {})
        self.stopped: set[str] = set()

    @staticmethod
    def from_config(cfg: DictConfig, sets: Sequence[EvaluationSet]) -> TaskSchedule:
        """Reads `solver.task_schedule`; lengths are iterations. Raises ConfigError naming the key."""
        plans = task_plans(cfg)
        stops = {task: _early_stop(task, plan, sets) for task, plan in plans.items() if plan.patience is not None}
        return TaskSchedule(plans, cfg.solver.max_iter, stops)

    def weights(self, iteration: int) -> dict[str, float]:
        """Task -> factor of its fixed weights in step `iteration`, counted from 0; 0 where it rests."""
        return {task: 0.0 if task in self.stopped else plan.weight(iteration) for task, plan in self.plans.items()}

    def scalars(self, iteration: int) -> dict[str, float]:
        """For the log: "task_weight/<task>" of the tasks that do not always train with weight 1."""
        weights = self.weights(iteration)
        return {f"task_weight/{task}": weights[task] for task, plan in self.plans.items() if plan != TaskPlan()}

    def update(self, metrics: Mapping[str, Metric], iteration: int) -> dict[str, dict[str, Any]]:
        """Takes in the evaluation after `iteration` steps. It counts for a task that trained in the last of them.

        A stop that would leave iterations without any task, before another one starts, waits for the next evaluation.

        Returns:
            task -> its metric with value and iteration, of those that stop early and were never better.

        Raises:
            ConfigError: there is no such metric.
        """
        weights, better = self.weights(iteration - 1), {}
        for task, stop in self.early_stops.items():
            if weights[task] == 0:
                continue
            stop.update(metrics, iteration)
            if stop.state["waited"] == 0:
                better[task] = {name: stop.state[name] for name in ("metric", "value", "iteration")}
            if stop.due and not self._leaves_a_pause(task, iteration):
                self.stopped.add(task)
                logger.info("the task %s stops early after iteration %d: %s", task, iteration, stop.reason())
        return better

    def end(self, iteration: int) -> int:
        """Where the training ends that has come to `iteration`: in the first iteration in which no task trains, at
        `max_iter` at the latest."""
        idle = (t for t, trains in self._training(iteration, self.stopped).items() if not trains)
        return min(next(idle, self.max_iter), self.max_iter)

    def state(self) -> dict[str, Any] | None:
        """Plain values for the checkpoint; None where no task may stop early: the rest follows from the iteration."""
        if not self.early_stops:
            return None
        return {"stopped": sorted(self.stopped), "tasks": {task: s.state for task, s in self.early_stops.items()}}

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Takes what `state` was when the run was interrupted. A task goes on if it has more patience now."""
        for task, stop in self.early_stops.items():
            stop.resume(state["tasks"].get(task) if state else None)
        were_stopped = state["stopped"] if state else ()
        self.stopped = {task for task, stop in self.early_stops.items() if task in were_stopped and stop.due}

    def describe(self) -> str:
        """One line per task that does not always train with weight 1."""
        lines = []
        for task, plan in self.plans.items():
            if plan != TaskPlan():
                weight = ", ".join(f"{weight:g} at {place}" for place, weight in plan.points)
                end = self.max_iter if plan.stop is None else min(plan.stop, self.max_iter)
                lines.append(f"  {task}: iterations {plan.start} to {end}, weight {weight}{self._until(task)}")
        return "\n".join(lines)

    def _until(self, task: str) -> str:
        stop = self.early_stops.get(task)
        return "" if stop is None else f", until {stop.metric} is no better for {stop.patience} evaluations"

    def _training(self, iteration: int, stopped: Collection[str]) -> dict[int, bool]:
        plans = {task: plan for task, plan in self.plans.items() if task not in stopped}
        return training(plans, iteration, self.max_iter)

    def _leaves_a_pause(self, task: str, iteration: int) -> bool:
        """Whether without the task there are iterations in which none trains, and later ones in which one does."""
        trains = [*self._training(iteration, {*self.stopped, task}).values()]
        return trains != sorted(trains, reverse=True)


def _early_stop(task: str, plan: TaskPlan, sets: Sequence[EvaluationSet]) -> EarlyStop:
    scored = (f"{entry.name}/{task}/{entry.evaluators[task].headline}" for entry in sets if task in entry.evaluators)
    metric = plan.metric or next(scored, None)
    key = f"{KEY}.{task}.early_stop.metric"
    if metric is None:
        raise ConfigError(f"{key}=null: no evaluation set of data.val scores the task; name a metric that there is")
    return EarlyStop(metric, plan.patience, key=key)
