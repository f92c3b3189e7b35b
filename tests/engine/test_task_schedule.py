"""A task that rests is as one that is not there: steps of the trainer, and the decisions of early stops."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulate_worker import make_trainer
from ddp_worker import ALL
from ranks import ROOT, run_ranks
from schedule_worker import PLANS, REGION_TASKS, STEPS
from tiny import make_sample, need_tasks, tiny_config, tiny_model

from mtl_rcnn.balancing import WeightedSum
from mtl_rcnn.config.task_plans import TaskPlan
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.early_stop import EarlyStop
from mtl_rcnn.engine.losses import reduce_losses
from mtl_rcnn.engine.task_schedule import TaskSchedule
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
MIXED = ["model.backbone.norm=BN", "tasks.mask.norm=BN"]


def _batches(steps: int) -> list[list[Any]]:
    return [[make_sample(2 * step + image, (64, 96), 2, labelled=ALL) for image in (0, 1)] for step in range(steps)]


def _plans(model: MultiTaskRCNN, **plans: TaskPlan) -> TaskSchedule:
    return TaskSchedule({task.name: plans.get(task.name, TaskPlan()) for task in model.tasks()}, 100)


def _trainer(model: MultiTaskRCNN, batches: list[list[Any]], weights: Mapping[str, float] | None = None,
             precision: torch.dtype | None = None, **plans: TaskPlan) -> Trainer:  # fmt: skip
    """With momentum and weight decay."""
    balancer = WeightedSum(model.loss_names(), weights)
    trainer = make_trainer(
        model, batches, ALONE, 1, balancer, precision=precision, task_schedule=_plans(model, **plans)
    )
    trainer.optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=0.1)
    return trainer


def _run(trainer: Trainer, steps: range) -> None:
    for trainer.iter in steps:
        trainer.run_step()


def _of(model: MultiTaskRCNN, part: str) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in model.parts()[part].state_dict().items()}


def _same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    assert list(one) == list(other)
    return all(torch.equal(tensor, other[name]) for name, tensor in one.items())


def test_until_it_starts_a_run_is_one_without_the_task_bit_for_bit() -> None:
    need_tasks(*ALL)
    batches = _batches(3)
    plain, model = (tiny_model(tasks, *MIXED) for tasks in (("detection", "mask"), tuple(ALL)))
    start = _of(model, "keypoint")
    without, trainer = _trainer(plain, batches), _trainer(model, batches, keypoint=TaskPlan(start=2))
    for _ in range(2):
        _run(without, range(1))
        _run(trainer, range(trainer.iter, trainer.iter + 1))
        trainer.iter += 1
        assert trainer.scalars == without.scalars | {"task_weight/keypoint": 0.0}
    for part in ("trunk", "detection", "mask"):
        assert _same(_of(model, part), _of(plain, part)), part
    assert _same(_of(model, "keypoint"), start)
    _run(trainer, range(2, 3))
    assert not _same(_of(model, "keypoint"), start)
    assert trainer.scalars["task_weight/keypoint"] == 1.0
    assert trainer.scalars["keypoint/heatmap"] > 0


@pytest.mark.parametrize("task", ALL)
def test_what_has_stopped_stays_bit_for_bit_while_the_others_learn(task: str) -> None:
    need_tasks(*ALL)
    model = tiny_model(tuple(ALL), *MIXED, "tasks.detection.conv_dims=[16]", "tasks.detection.norm=BN")
    proposing = model.parts()["detection"].rpn.rpn_head  # which a detector at rest goes on to run
    proposing.conv = torch.nn.Sequential(proposing.conv, torch.nn.BatchNorm2d(16))
    trainer = _trainer(model, _batches(4), **{task: TaskPlan(stop=2)})
    _run(trainer, range(2))
    stopped = {part: _of(model, part) for part in model.parts()}
    _run(trainer, range(2, 4))
    for part, before in stopped.items():
        assert _same(before, _of(model, part)) == (part == task), part
    assert not [name for name in trainer.scalars if name.startswith(f"{task}/")]
    assert trainer.optimizer.state[next(model.parts()[task].parameters())]["momentum_buffer"].any()


@pytest.mark.parametrize("resting", [("detection",), ("mask", "keypoint"), ("detection", "keypoint")])
def test_the_trunk_learns_from_the_training_tasks_alone(resting: tuple[str, ...]) -> None:
    need_tasks(*ALL)
    model = tiny_model(tuple(ALL), "model.backbone.norm=GN", "model.backbone.width=32").double().train()
    samples = _batches(1)[0]
    losses = reduce_losses(model(samples)[0], samples, ALONE).losses
    wanted = sum(loss for name, loss in losses.items() if name.split("/")[0] not in resting)
    trunk = list(model.backbone.parameters())
    expected = torch.autograd.grad(wanted, trunk)
    trainer = _trainer(model, [samples], **dict.fromkeys(resting, TaskPlan(start=5)))
    _run(trainer, range(1))
    for parameter, gradient in zip(trunk, expected):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-12, atol=1e-15)
    assert trainer.scalars["total"] == pytest.approx(float(wanted.detach()), rel=1e-12)
    for part, module in model.parts().items():
        assert all((p.grad is None) == (part in resting) for p in module.parameters()), part


def test_a_resting_head_that_holds_nan_harms_nobody() -> None:
    need_tasks(*ALL)
    model = tiny_model(("detection", "mask", "keypoint"), *MIXED)
    for parameter in model.parts()["keypoint"].parameters():
        torch.nn.init.constant_(parameter, torch.nan)
    trainer = _trainer(model, _batches(2), precision=torch.float16, keypoint=TaskPlan(start=5))
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    start = _of(model, "trunk")
    _run(trainer, range(2))
    assert trainer.scalars["loss_scale"] == 2.0**8  # nothing has overflowed
    assert not _same(start, _of(model, "trunk"))
    assert all(tensor.isfinite().all() for part in ("trunk", "mask") for tensor in _of(model, part).values())


def test_every_parameter_takes_part_in_the_backward_pass_though_most_of_the_trunk_serves_resting_tasks() -> None:
    """DDP waits for a gradient of every parameter. Here the task that trains needs one level of the pyramid."""
    need_tasks("detection", "image_label")
    model = tiny_model(("detection", "image_label"), "tasks.image_label.levels=[p5]").train()
    sample = make_sample(0, (64, 96), 2, labelled={"detection": True, "image_label": False})
    sums, _ = model([sample], {"detection"})
    sum(total for total, _ in sums.values()).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert not any(p.grad.any() for p in model.parts()["detection"].parameters())


def test_weights_multiply_the_fixed_ones_before_the_method_sees_the_loss() -> None:
    need_tasks(*ALL)
    batches, model = _batches(2), tiny_model(tuple(ALL), *MIXED)
    plan = TaskPlan(points=((0, 1.0), (4, 0.0)))
    trainer = _trainer(model, batches, {"mask": 3.0, "detection/rpn_cls": 2.0}, mask=plan)
    _run(trainer, range(1, 2))
    found = trainer.scalars
    expected = sum(value for name, value in found.items() if name.split("/")[0] in ALL)
    expected += found["detection/rpn_cls"] + (3.0 * 0.75 - 1.0) * found["mask/bce"]
    assert found["total"] == pytest.approx(expected, rel=1e-12)
    assert found["task_weight/mask"] == 0.75
    assert not {"task_weight/detection", "weight/mask"} & set(found)
    other = tiny_model(tuple(ALL), *MIXED)
    _run(_trainer(other, batches, {"mask": 2.25, "detection/rpn_cls": 2.0}), range(1))
    assert _same(model.state_dict(), other.state_dict())


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of (ranks, micro-batches per rank): 1 x 1, 2 x 1, 2 x 2."""
    need_tasks(*REGION_TASKS)
    folder = tmp_path_factory.mktemp("schedule")
    for world, accumulate in ((1, 1), (2, 1), (2, 2)):
        command = [str(ROOT / "tests" / "schedule_worker.py"), str(folder), str(accumulate)]
        for status, output in run_ranks(command, world):
            assert status == 0, output
    return {path.stem: torch.load(path) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize(("method", "accumulate"), [("sum", 1), ("sum", 2), ("famo", 1), ("famo", 2), ("upgrad", 1)])
def test_two_ranks_and_micro_batches_train_as_one(
    method: str, accumulate: int, results: dict[str, dict[str, Any]]
) -> None:
    whole = results["world1_rank0_accumulate1"][method]
    first, second = (results[f"world2_rank{rank}_accumulate{accumulate}"][method] for rank in (0, 1))
    assert first["values"] == second["values"]
    for step, values in enumerate(whole["values"]):
        trained = {name.split("/")[0] for name in values if name.split("/")[0] in REGION_TASKS}
        assert trained == {task for task in REGION_TASKS if PLANS.get(task, TaskPlan()).weight(step) > 0}
        assert first["values"][step]["total"] == pytest.approx(values["total"], rel=1e-9)
    assert len(whole["values"]) == STEPS
    for name, tensor in whole["model"].items():
        assert torch.equal(first["model"][name], second["model"][name]), name
        assert (first["model"][name] - tensor).abs().max() <= 1e-9, name


SCORES = {  # after each evaluation, from 1
    "a": [1.0, 2.0, 2.0, 1.5, 9.0, 9.5],  # with a patience of 2, stops after the fourth
    "b": [5.0, 4.0, 4.5, 3.0, 3.5, 2.5],  # lower is better; with a patience of 2, goes on
}


def _schedule(patience: Mapping[str, int], max_iter: int = 6, **plans: TaskPlan) -> TaskSchedule:
    plans = {task: plans.get(task, TaskPlan()) for task in "abc"} | plans
    return TaskSchedule(plans, max_iter, {task: EarlyStop(f"toy/{task}/x", p) for task, p in patience.items()})


def _metrics(number: int) -> dict[str, Metric]:
    return {f"toy/{task}/x": Metric(values[number - 1], task != "b") for task, values in SCORES.items()}


@pytest.mark.parametrize("cut", range(7))
def test_each_task_stops_by_its_own_metric_and_keeps_its_best(cut: int) -> None:
    schedule = _schedule({"a": 2, "b": 2})
    best = {}
    for number in range(1, 7):
        best |= {task: found["iteration"] for task, found in schedule.update(_metrics(number), number).items()}
        assert schedule.weights(number) == {"a": float(number < 4), "b": 1.0, "c": 1.0}
        assert schedule.end(number) == 6
        if number == cut:
            state, schedule = schedule.state(), _schedule({"a": 2, "b": 2})
            schedule.resume(state)
    assert best == {"a": 2, "b": 6}
    patient = _schedule({"a": 5, "b": 2})
    patient.resume(schedule.state())
    assert patient.weights(6) == {"a": 1.0, "b": 1.0, "c": 1.0}


def test_evaluations_count_for_a_task_that_trains() -> None:
    schedule = _schedule({"a": 1}, a=TaskPlan(start=2, stop=4))
    seen = {number: schedule.update(_metrics(number), number) for number in range(1, 7)}
    assert {number: found["a"]["value"] for number, found in seen.items() if found} == {3: 2.0}
    assert schedule.stopped == {"a"}  # after the fourth: it had trained in the step before


def test_the_run_ends_with_its_last_task() -> None:
    schedule = _schedule({"a": 1, "b": 1}, c=TaskPlan(stop=5))
    ends = []
    for number in range(1, 5):
        schedule.update(_metrics(number), number)
        ends.append(schedule.end(number))
    assert ends == [6, 6, 5, 5]  # a and b stop after 3; c is planned until 5
    together = _schedule({"a": 1, "b": 1}, c=TaskPlan(stop=1))
    for number in (1, 2, 3):
        together.update(_metrics(number), number)
    assert together.end(3) == 3


def test_a_stop_that_leaves_a_pause_before_another_start_waits() -> None:
    schedule = _schedule({"a": 2}, b=TaskPlan(stop=2), c=TaskPlan(start=5))
    weights = []
    for number in range(1, 6):
        schedule.update(_metrics(min(number, 4)), number)
        weights.append(schedule.weights(number)["a"])
    assert weights == [1, 1, 1, 1, 0]  # due after 4, when c has not started
    assert schedule.end(5) == 6


def test_an_unknown_metric_is_told_with_its_neighbour_and_a_set_that_does_not_score_the_task_too() -> None:
    key = "solver.task_schedule.a.early_stop.metric"
    schedule = TaskSchedule({"a": TaskPlan()}, 6, {"a": EarlyStop("toy/a/y", 1, key=key)})
    with pytest.raises(ConfigError, match=r"task_schedule\.a\.early_stop\.metric=toy/a/y: .*did you mean toy/a/x\?"):
        schedule.update(_metrics(1), 1)
    cfg = tiny_config(("detection",), "data.val=[{name: a, images: b}]",
                      "+solver.task_schedule.detection.early_stop.patience=1")  # fmt: skip
    with pytest.raises(ConfigError, match=r"detection\.early_stop\.metric=null: no evaluation set of data\.val scores"):
        TaskSchedule.from_config(cfg, [])
