"""One rank of tests/engine/test_accumulate.py: two steps of the trainer on four images of each label pattern, in
micro-batches; writes weights, loss values and the number of communicated gradient buckets per step."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from ddp_worker import ALL, PATTERNS, sample_of
from tiny import LABEL_SPACE, tiny_model
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

from mtl_rcnn.balancing import Scalarizer, WeightedSum
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.schedule import LrSchedule
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.train import distribute
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.engine.val_losses import validation_losses
from mtl_rcnn.evaluation.inference import EvaluationSet
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

STEPS = 2


def make_trainer(
    model: MultiTaskRCNN,
    batches: list[list[Sample]],
    ranks: Ranks,
    accumulate: int,
    balancer: Scalarizer | None = None,
    **options: Any,
) -> Trainer:
    """A trainer that only needs `run_step` to be called."""
    balancer = balancer or WeightedSum(model.loss_names(), {})
    return Trainer(
        distribute(model, ranks),
        balancer,
        torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9),
        LrSchedule(lr=options.pop("lr", 0.01), max_iter=100),
        iter(batches),
        ranks,
        options.pop("precision", None),
        None,
        Stopwatch(4, STEPS, ranks.device),
        (Path("failures"), {}, LABEL_SPACE),
        accumulate,
        **options,
    )


def network() -> MultiTaskRCNN:
    """GroupNorm: no image acts on another."""
    return tiny_model(tuple(ALL), "model.backbone.norm=GN", "model.backbone.width=32").double()


def batches_of(pattern: str, ranks: Ranks) -> list[list[Sample]]:
    """This rank's share of four images per step."""
    share = 4 // ranks.world
    batches = [[sample_of(4 * step + i, has) for i, has in enumerate(PATTERNS[pattern])] for step in range(STEPS)]
    return [batch[ranks.rank * share : (ranks.rank + 1) * share] for batch in batches]


def train(pattern: str, ranks: Ranks, accumulate: int) -> dict[str, Any]:
    """Two steps."""
    trainer = make_trainer(network(), batches_of(pattern, ranks), ranks, accumulate)
    buckets: list[int] = []

    def counting(state, bucket):  # DDP compares annotations with types, and here they are texts
        buckets.append(bucket.index())
        return allreduce_hook(state, bucket)

    if isinstance(trainer.model, nn.parallel.DistributedDataParallel):
        trainer.model.register_comm_hook(None, counting)
    for _ in range(STEPS):
        trainer.run_step()
    return {"model": trainer.network.state_dict(), "values": trainer.scalars, "buckets": buckets}


def validation(ranks: Ranks) -> dict[str, float]:
    """Validation losses of five images, shared out unevenly."""
    samples = [[sample_of(index, ALL)] for index in range(5)]
    mine = samples if ranks.world == 1 else [samples[:2], samples[2:]][ranks.rank]
    found = validation_losses(network(), [EvaluationSet("some", [], {}, mine)], seed=0)
    return {name: metric.value for name, metric in found.items()}


def main(folder: str, accumulate: str) -> None:
    """Trains every pattern and writes the results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        results = {pattern: train(pattern, ranks, int(accumulate)) for pattern in PATTERNS}
        results["validation"] = validation(ranks)
        torch.save(results, Path(folder) / f"world{ranks.world}_rank{ranks.rank}_accumulate{accumulate}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
