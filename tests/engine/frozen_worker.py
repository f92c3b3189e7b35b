"""One rank of tests/engine/test_freeze.py: steps of the trainer with frozen parts; writes the network."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accumulate_worker import make_trainer
from frozen_runs import ONE_SIZE, counted_trunk
from test_schedule import SOLVER
from tiny import make_sample, tiny_config, tiny_model

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks, barrier, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.freeze import cache_features, freeze
from mtl_rcnn.engine.schedule import build_optimizer

FROZEN = {"bottom up": "backbone.bottom_up.", "trunk": "backbone.", "features kept": "backbone."}
"""Case -> start of the names of what is frozen."""
NAMES = {"bottom up": "backbone.bottom_up.*", "trunk": "trunk", "features kept": "trunk"}
STEPS = 3


def batch(step: int, ranks: Ranks) -> list[Sample]:
    """Two images: first the same on both ranks, which race to keep them; then a new one for each rank, and at last that
    of the other rank."""
    images = (0, 1) if step == 0 else (2 + (ranks.rank + step) % 2, step % 2)
    return [make_sample(index, (96, 128), 3) for index in images]


def train(case: str, folder: Path, ranks: Ranks) -> dict[str, Any]:
    """The network after some steps, how often the trunk ran in each, and the number of files of features."""
    kept = str(folder / "features") if case == "features kept" else "null"
    cfg = tiny_config(["detection"], *ONE_SIZE, "solver.freeze=[trunk]", f"model.cache_features={kept}")
    model = tiny_model(["detection"])
    freeze(model, [NAMES[case]])
    cache_features(cfg, model)
    trainer = make_trainer(model, [batch(step, ranks) for step in range(STEPS)], ranks, 1, lr=0.02)
    trainer.optimizer = build_optimizer(model, {**SOLVER, "weight_decay": 0.1, "weight_decay_norm": None})
    barrier()
    runs = []
    for trainer.iter in range(STEPS):
        with counted_trunk() as seen:
            trainer.run_step()
        runs.append(len(seen))
        barrier()
    files = sum(path.is_file() for path in (folder / "features").rglob("*"))
    return {"model": model.state_dict(), "runs": runs, "files": files}


def main(folder: str) -> None:
    """Every case."""
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        results = {case: train(case, Path(folder), ranks) for case in FROZEN}
        torch.save(results, Path(folder) / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
