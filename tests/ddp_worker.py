"""One rank of tests/test_ddp.py: two steps of box + mask + keypoint on four images of each label pattern; writes
the weights."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from tiny import make_sample, tiny_model

from mtl_rcnn.balancing import WeightedSum
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.losses import reduce_losses
from mtl_rcnn.engine.train import distribute

ALL = {"detection": True, "mask": True, "keypoint": True}
NONE = dict.fromkeys(ALL, False)
PATTERNS = {
    "everything": [ALL, ALL, ALL, ALL],
    "masks on one rank only": [ALL, ALL, {**ALL, "mask": False}, {**ALL, "mask": False}],
    "keypoints on one rank only": [{**ALL, "keypoint": False}, {**ALL, "keypoint": False}, ALL, ALL],
    "no boxes on one rank": [ALL, ALL, NONE, NONE],
    "no labels anywhere": [NONE, NONE, NONE, NONE],
    "no boxes on one image of each rank": [ALL, NONE, NONE, ALL],
}


def sample_of(index: int, labelled: dict[str, bool]) -> Sample:
    """An image of a fixed size whose instances carry what `labelled` says."""
    none = torch.zeros(3, dtype=torch.bool)
    absent = {f"has_{task}": none for task in ("mask", "keypoint") if not labelled[task]}
    return make_sample(index, (96, 128), 3, labelled=labelled, **absent)


def train(pattern: str, ranks: Ranks) -> dict[str, Any]:
    """Weights and loss values after two steps on this rank's share of the four images."""
    model = tiny_model(tuple(ALL), "model.backbone.norm=GN", "model.backbone.width=32").double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    balancer = WeightedSum(model.loss_names(), {})
    network = distribute(model, ranks)
    share = 4 // ranks.world
    values = {}
    for step in range(2):
        samples = [sample_of(4 * step + i, labelled) for i, labelled in enumerate(PATTERNS[pattern])]
        mine = samples[ranks.rank * share : (ranks.rank + 1) * share]
        sums, _ = network(mine)
        reduced = reduce_losses(sums, mine, ranks)
        values = reduced.values
        optimizer.zero_grad()
        balancer(reduced.losses, reduced.values, reduced.valid).backward()
        assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
        optimizer.step()
    return {"model": model.state_dict(), "values": values}


def main(folder: str) -> None:
    """Trains every pattern and writes the results."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        results = {pattern: train(pattern, ranks) for pattern in PATTERNS}
        torch.save(results, Path(folder) / f"world{ranks.world}_rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
