"""For every balancing method a task that rests is as one that the network does not have."""

from __future__ import annotations

import pytest
import torch
from accumulate_worker import make_trainer
from balance_worker import BALANCING, SMALL, TASKS, Bench
from tiny import need_tasks, tiny_config
from toy import Toy

from mtl_rcnn.config.task_plans import TaskPlan
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.task_schedule import TaskSchedule
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.mark.parametrize("method", [method for method in BALANCING if method not in ("sum", "rlw")])  # rlw: other draws
def test_for_a_balancing_method_a_resting_task_is_not_there(method: str, toy: Toy) -> None:
    need_tasks(*TASKS)
    bench, (resting, *others) = Bench(toy), TASKS

    def train(tasks: tuple[str, ...]) -> tuple[MultiTaskRCNN, Trainer]:
        cfg = tiny_config(tasks, *SMALL, *(word for word in BALANCING[method] if "depth" not in word))
        model = build_model(cfg, bench.space).double()
        balancer = build_balancer(cfg, model, None)
        share_gradients(balancer, model, ALONE, cfg.solver)
        schedule = TaskSchedule({task: TaskPlan(start=3 if task == resting else 0) for task in tasks}, 100)
        trainer = make_trainer(
            model, [bench.batch(step) for step in range(4)], ALONE, 1, balancer, task_schedule=schedule
        )
        for trainer.iter in range(3):
            trainer.run_step()
        return model, trainer

    plain, _ = train(tuple(others))
    model, trainer = train(TASKS)
    for part in ("trunk", *others):
        for name, tensor in plain.parts()[part].state_dict().items():
            assert (model.parts()[part].state_dict()[name] - tensor).abs().max() <= 1e-12, (part, name)
    trainer.iter = 3
    trainer.run_step()  # and it joins
    assert trainer.scalars[f"{resting}/cross_entropy"] > 0
