"""When each task trains, and with what weight (`solver.task_schedule`)."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.durations import is_epochs
from mtl_rcnn.config.keys import nearest
from mtl_rcnn.errors import ConfigError

__all__ = ["KEY", "TaskPlan", "check_task_schedule", "task_plans", "training"]

KEY = "solver.task_schedule"
_KEYS = ("start", "stop", "weights", "early_stop")
_EARLY_STOP_KEYS = ("metric", "patience")


@dataclass(frozen=True)
class TaskPlan:
    """What is planned for a task; by default it trains always, with weight 1.

    Attributes:
        start, stop: it trains in iterations start <= t < stop, counted from 0; None: to the end.
        points: (iteration, weight) in order, the weights finite and at least 0; see `weight`.
        metric: of the early stop, "dataset/task/metric", or None for the task's headline metric.
        patience: of the early stop, in evaluations; None for no early stop.
    """

    start: int = 0
    stop: int | None = None
    points: tuple[tuple[int, float], ...] = ((0, 1.0),)
    metric: str | None = None
    patience: int | None = None

    def weight(self, iteration: int) -> float:
        """The factor of the task's loss; 0 where it does not train.

        Between two points it lies on a line, before the first and after the last it is theirs. Of several points at one
        iteration the last holds from there on, so that two make a jump.
        """
        if iteration < self.start or (self.stop is not None and iteration >= self.stop):
            return 0.0
        after = bisect_right(self.points, iteration, key=lambda point: point[0])
        if after in (0, len(self.points)):
            return self.points[max(after - 1, 0)][1]
        (left, low), (right, high) = self.points[after - 1 : after + 1]
        return low + (high - low) * (iteration - left) / (right - left)

    def changes(self) -> set[int]:
        """Iterations at which it may change whether the task trains: a line that is not 0 everywhere is 0 at its ends
        alone."""
        ends = {self.start} if self.stop is None else {self.start, self.stop}
        return ends | {place + step for place, _ in self.points for step in (0, 1)}


def training(plans: Mapping[str, TaskPlan], start: int, end: int) -> dict[int, bool]:
    """Whether any task trains: at iteration `start`, and, in order, at each later one before `end` where that may
    change."""
    moments = sorted({start, *(t for plan in plans.values() for t in plan.changes() if start < t < end)})
    return {t: any(plan.weight(t) > 0 for plan in plans.values()) for t in moments}


def task_plans(cfg: DictConfig) -> dict[str, TaskPlan]:
    """The plan of every selected task.

    Args:
        cfg: a training configuration whose lengths are iterations (`in_iterations`), or fractions of `solver.max_iter`.

    Raises:
        ConfigError: names the key that is wrong, or the first iteration in which no task would train.
    """
    entries, end = _entries(cfg), cfg.solver.max_iter
    plans = {task: _plan(f"{KEY}.{task}", entries.get(task, {}), end) for task in cfg.tasks}
    idle = next((t for t, trains in training(plans, 0, end).items() if not trains), None)
    if idle is not None:
        raise ConfigError(f"{KEY}: no task trains in iteration {idle} of {end}; let one start earlier or stop later")
    return plans


def check_task_schedule(cfg: DictConfig) -> None:
    """Refuses a faulty schedule. Where epochs occur, the order of iterations is known, and told by `task_plans`, only
    when the data is.

    Raises:
        ConfigError: see `task_plans`.
    """
    entries = _entries(cfg)
    lengths = [entry[name] for entry in entries.values() for name in ("start", "stop") if name in entry]
    lengths += [place for entry in entries.values() for place, _ in entry.get("weights") or ()]
    if entries and not any(is_epochs(length) for length in (cfg.solver.max_iter, *lengths)):
        task_plans(cfg)


def _entries(cfg: DictConfig) -> dict[str, dict[str, Any]]:
    """The schedule as plain values, every single one in range."""
    node = cfg.solver.get("task_schedule") or {}
    entries = OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else node
    _check_keys(KEY, entries, [*(cfg.get("tasks") or ())], "task")
    for task, entry in entries.items():
        where = f"{KEY}.{task}"
        _check_keys(where, entry, _KEYS, "key")
        for name in ("start", "stop"):
            if entry.get(name) is not None:
                _check_length(f"{where}.{name}", entry[name])
        if entry.get("weights") is not None:
            _check_weights(f"{where}.weights", entry["weights"])
        if entry.get("early_stop") is not None:
            _check_early_stop(cfg, f"{where}.early_stop", entry["early_stop"])
    return entries


def _plan(where: str, entry: Mapping[str, Any], end: int) -> TaskPlan:
    """An entry in iterations; what contradicts itself there is refused."""
    start = _iteration(entry.get("start") or 0, end)
    if start >= end:
        raise ConfigError(f"{where}.start={start}: not before the end, solver.max_iter={end}")
    stop = entry.get("stop")
    if stop is not None and _iteration(stop, end) <= start:
        raise ConfigError(f"{where}.stop={stop}: iteration {_iteration(stop, end)} is not after the start, {start}")
    given = entry.get("weights")
    points = [(0, 1.0)] if given is None else [(_iteration(place, end), float(weight)) for place, weight in given]
    places = [place for place, _ in points]
    if places != sorted(places):
        raise ConfigError(f"{where}.weights={given}: the iterations {places} must increase")
    early_stop = entry.get("early_stop") or {}
    return TaskPlan(
        start,
        None if stop is None else _iteration(stop, end),
        tuple(points),
        early_stop.get("metric"),
        early_stop.get("patience"),
    )


def _iteration(length: int | float, end: int) -> int:
    return max(1, round(length * end)) if isinstance(length, float) else length


def _check_keys(where: str, node: Any, known: Sequence[str], kind: str) -> None:
    if not isinstance(node, Mapping):
        raise ConfigError(f"{where}={node}: expected a mapping of {', '.join(known)}")
    for name in node:
        if name not in known:
            close = nearest(str(name), known)
            hint = f"did you mean '{close}'?" if close else f"there are {', '.join(known)}"
            raise ConfigError(f"{where}: no {kind} '{name}'; {hint}")


def _check_length(where: str, value: Any) -> None:
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= 0
    if not (whole or is_epochs(value) or (isinstance(value, float) and 0 < value < 1)):
        raise ConfigError(
            f"{where}={value}: expected an iteration (0, 1, ...), epochs such as 2ep, or a fraction of max_iter in "
            "(0, 1)"
        )


def _check_weights(where: str, value: Any) -> None:
    pairs = isinstance(value, list) and value and all(isinstance(point, list) and len(point) == 2 for point in value)
    if not pairs:
        raise ConfigError(f"{where}={value}: expected a list of [iteration, weight], such as [[0, 1.0], [1000, 0.1]]")
    for place, weight in value:
        _check_length(where, place)
        number = isinstance(weight, int | float) and not isinstance(weight, bool)
        if not (number and 0 <= weight < math.inf):
            raise ConfigError(f"{where}={value}: the weight {weight} is no number of at least 0")


def _check_early_stop(cfg: DictConfig, where: str, node: Any) -> None:
    _check_keys(where, node, _EARLY_STOP_KEYS, "key")
    patience, metric = node.get("patience"), node.get("metric")
    if not isinstance(patience, int) or isinstance(patience, bool) or patience < 1:
        raise ConfigError(f"{where}.patience={patience}: expected a whole number of at least 1")
    if metric is not None and not (isinstance(metric, str) and metric.count("/") >= 2):
        raise ConfigError(f"{where}.metric={metric}: expected null or dataset/task/metric")
    if cfg.solver.get("eval_period") == 0:
        raise ConfigError(f"{where}: needs evaluations on the way; set solver.eval_period > 0")
    if not OmegaConf.select(cfg, "data.val"):
        raise ConfigError(f"{where}: there is no evaluation set; give one with data.val")
