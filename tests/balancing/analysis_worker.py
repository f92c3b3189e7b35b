"""One rank of tests/balancing/test_task_analysis.py: three steps of the trainer with and without analysis; writes the
weights, and what was seen in each step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accumulate_worker import make_trainer
from balance_worker import BALANCING, SMALL, TASKS, Bench
from tiny import tiny_config
from toy import write_toy

from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.trainer import PRECISIONS

METHODS = ("sum", "upgrad")
STEPS = 3


def train(
    bench: Bench,
    method: str,
    ranks: Ranks,
    every: int,
    precision: str = "float32",
    accumulate: int = 1,
    dtype: torch.dtype = torch.float64,
    lr: float = 0.01,
) -> dict[str, Any]:
    """Three steps on this rank's share of each batch."""
    cfg = tiny_config(TASKS, *SMALL, *BALANCING[method], f"solver.precision={precision}")
    model = build_model(cfg, bench.space).to(dtype)
    share = 4 // ranks.world
    batches = [bench.batch(step)[ranks.rank * share :][:share] for step in range(STEPS)]
    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ranks, cfg.solver)
    options = {"precision": PRECISIONS[precision], "lr": lr, "analyse_every": every}
    trainer = make_trainer(model, batches, ranks, accumulate, balancer, **options)
    seen = []
    for trainer.iter in range(STEPS):
        trainer.run_step()
        seen.append(trainer.analysis)
    return {"model": model.state_dict(), "seen": seen, "split": model.split is not None}


def main(folder: str) -> None:
    """Trains with every method and writes the results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        bench = Bench(write_toy(Path(folder) / f"toy_{ranks.world}_{ranks.rank}"))
        results = {method: {"analysed": train(bench, method, ranks, every=1)} for method in METHODS}
        for method in METHODS if ranks.world > 1 else ():
            results[method]["plain"] = train(bench, method, ranks, every=0)
        torch.save(results, Path(folder) / f"world{ranks.world}_rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
