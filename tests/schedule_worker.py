"""One rank of tests/engine/test_task_schedule.py: four steps of box + mask + keypoint in which each task rests at some
time; writes the weights and the values of every step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accumulate_worker import make_trainer
from ddp_worker import ALL, PATTERNS, sample_of
from tiny import tiny_config, tiny_model

from mtl_rcnn.config.task_plans import TaskPlan
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.task_schedule import TaskSchedule

REGION_TASKS = tuple(ALL)
STEPS = 4
PLANS = {
    "detection": TaskPlan(points=((0, 1.0), (1, 0.0), (2, 0.0), (3, 1.0))),
    "mask": TaskPlan(stop=3, points=((0, 0.5), (2, 1.5))),
    "keypoint": TaskPlan(start=1),
}
METHODS = {"sum": ["balancing=sum"], "famo": ["balancing=famo", "balancing.every=1"], "upgrad": ["balancing=upgrad"]}
LABELS = [PATTERNS[name] for name in ("everything", "masks on one rank only", "no boxes on one rank", "everything")]
SMALL = ["model.backbone.norm=GN", "model.backbone.width=32"]


def train(method: str, ranks: Ranks, accumulate: int) -> dict[str, Any]:
    """Four steps on this rank's share of four images."""
    cfg = tiny_config(REGION_TASKS, *SMALL, *METHODS[method])
    model = tiny_model(REGION_TASKS, *SMALL).double()
    share = 4 // ranks.world
    batches = [[sample_of(4 * step + i, has) for i, has in enumerate(labels)] for step, labels in enumerate(LABELS)]
    batches = [batch[ranks.rank * share :][:share] for batch in batches]
    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ranks, cfg.solver)
    trainer = make_trainer(model, batches, ranks, accumulate, balancer, task_schedule=TaskSchedule(PLANS, STEPS))
    values = []
    for trainer.iter in range(STEPS):
        trainer.run_step()
        values.append(dict(trainer.scalars))
    return {"model": model.state_dict(), "values": values}


def main(folder: str, accumulate: str) -> None:
    """Trains with every method and writes the results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        methods = [method for method in METHODS if accumulate == "1" or method != "upgrad"]
        results = {method: train(method, ranks, int(accumulate)) for method in methods}
        torch.save(results, Path(folder) / f"world{ranks.world}_rank{ranks.rank}_accumulate{accumulate}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
