"""When each task trains, and with what weight: against NumPy, against every single iteration, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf
from tiny import need_tasks

from mtl_rcnn.config import compose
from mtl_rcnn.config.durations import in_iterations
from mtl_rcnn.config.task_plans import TaskPlan, task_plans, training
from mtl_rcnn.errors import ConfigError

KEY = "solver.task_schedule"


@pytest.mark.parametrize("seed", range(5))
def test_the_weight_lies_on_lines_between_the_points(seed: int) -> None:
    rng = np.random.default_rng(seed)
    places, weights = np.sort(rng.choice(30, 4, replace=False)), rng.uniform(0, 2, 4)
    plan = TaskPlan(5, 25, tuple(zip(places.tolist(), weights.tolist())))
    for t in range(30):
        expected = np.interp(t, places, weights) if 5 <= t < 25 else 0.0
        assert plan.weight(t) == pytest.approx(expected, abs=1e-12)


def test_two_points_at_one_iteration_are_a_jump() -> None:
    plan = TaskPlan(points=((0, 1.0), (3, 1.0), (3, 0.25)))
    assert [plan.weight(t) for t in range(6)] == [1, 1, 1, 0.25, 0.25, 0.25]
    assert [TaskPlan().weight(t) for t in (0, 10**9)] == [1, 1]


def _random_plan(rng: np.random.Generator) -> TaskPlan:
    start = int(rng.integers(0, 12))
    stop = int(rng.integers(start + 1, 25)) if rng.random() < 0.7 else None
    places = sorted(rng.integers(0, 25, 4).tolist())
    return TaskPlan(start, stop, tuple((place, float(rng.integers(0, 2))) for place in places))


@pytest.mark.parametrize("seed", range(50))
def test_whether_any_task_trains_changes_where_it_is_said_to(seed: int) -> None:
    rng = np.random.default_rng(seed)
    plans = {name: _random_plan(rng) for name in "ab"}
    first = int(rng.integers(0, 10))
    found = training(plans, first, 20)
    known = found[first]
    for t in range(first, 20):
        known = found.get(t, known)
        assert known == any(plan.weight(t) > 0 for plan in plans.values()), t
    assert list(found) == sorted(found)


def _compose(*overrides: str) -> DictConfig:
    need_tasks("detection", "semantic")
    run = ["tasks=[detection,semantic]", "data.root=x", "solver.max_iter=100", "solver.steps=[]"]
    return compose("train", run + [f"+{KEY}.{override}" for override in overrides])


def test_lengths_are_iterations_epochs_or_fractions() -> None:
    cfg = _compose(
        "semantic={start: 2ep, stop: 0.9, weights: [[2ep, 0.0], [0.5, 1], [60, 2]]}", "detection.weights=[[0, 2]]"
    )
    cfg.solver.batch_size = 4
    plans = task_plans(in_iterations(cfg, 40))
    assert plans == {
        "detection": TaskPlan(points=((0, 2.0),)),
        "semantic": TaskPlan(20, 90, ((20, 0.0), (50, 1.0), (60, 2.0))),
    }


def test_what_follows_from_the_length_of_an_epoch_is_told_when_it_is_known() -> None:
    cfg = _compose("semantic={start: 2ep, stop: 30}")
    cfg.solver.batch_size = 4
    assert task_plans(in_iterations(cfg, 40))["semantic"] == TaskPlan(20, 30)
    with pytest.raises(ConfigError, match=rf"{KEY}\.semantic\.stop=30: iteration 30 is not after the start, 40"):
        task_plans(in_iterations(cfg, 80))


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["semantc.start=5"], r": no task 'semantc'; did you mean 'semantic'\?"),
        (["semantic.strat=5"], r"\.semantic: no key 'strat'; did you mean 'start'\?"),
        (["semantic.early_stop={patients: 2}"], r"\.semantic\.early_stop: no key 'patients'; did you mean 'patience'"),
        (["semantic=5"], r"\.semantic=5: expected a mapping of start, stop, weights, early_stop"),
        (["semantic.start=-1"], r"\.semantic\.start=-1: expected an iteration \(0, 1, \.\.\.\), epochs such"),
        (["semantic.stop=1.5"], r"\.semantic\.stop=1\.5: expected an iteration"),
        (["semantic.start=100"], r"\.semantic\.start=100: not before the end, solver\.max_iter=100"),
        (["semantic.start=50", "semantic.stop=0.5"], r"\.semantic\.stop=0\.5: iteration 50 is not after the start, 50"),
        (["semantic.weights=[[0,1],[5,-1]]"], r"\.semantic\.weights=.*: the weight -1 is no number of at least 0"),
        (["semantic.weights=[[9,1],[5,2]]"], r"\.semantic\.weights=.*: the iterations \[9, 5\] must increase"),
        (["semantic.weights=0.5"], r"\.semantic\.weights=0\.5: expected a list of \[iteration, weight\]"),
        (["semantic.weights=[[soon,1]]"], r"\.semantic\.weights=soon: expected an iteration"),
        (["semantic.early_stop.patience=0"], r"\.semantic\.early_stop\.patience=0: expected a whole number"),
        (["semantic.early_stop={patience: 1, metric: mIoU}"], r".*metric=mIoU: expected null or dataset/task/metric"),
        (["semantic.start=10", "detection.stop=9"], r": no task trains in iteration 9 of 100; let one start"),
        (["semantic.weights=[[0,0],[9,1]]", "detection.start=1"], r": no task trains in iteration 0 of 100"),
    ],
)  # fmt: skip
def test_a_faulty_schedule_is_refused_by_name(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=KEY.replace(".", r"\.") + said):
        _compose(*overrides)


@pytest.mark.parametrize(("option", "said"), [("solver.eval_period=0", "needs evaluations"), ("data.val=[]", "no e")])
def test_an_early_stop_needs_evaluations(option: str, said: str) -> None:
    stop = f"+{KEY}.detection.early_stop.patience=2"
    with pytest.raises(ConfigError, match=rf"{KEY}\.detection\.early_stop: .*{said}"):
        compose("train", ["tasks=[detection]", "data.root=x", "data.val=[{name: a, images: b}]", stop, option])


def test_a_schedule_that_is_no_mapping_is_refused() -> None:
    with pytest.raises(ConfigError, match=rf"{KEY}=5: expected a mapping of detection"):
        compose("train", ["tasks=[detection]", "data.root=x", f"{KEY}=5"])


def test_without_a_schedule_every_task_always_trains() -> None:
    cfg = OmegaConf.create({"solver": {"max_iter": 10}, "tasks": {"a": {}, "b": {}}})
    assert task_plans(cfg) == {"a": TaskPlan(), "b": TaskPlan()}
