"""One of two ranks of tests/test_mixed_labels.py: iterations on every arrangement of data sets over the ranks, and on
batches as a mixture plans them, at least fifty in all."""

from __future__ import annotations

import sys
from collections import Counter
from itertools import combinations, combinations_with_replacement
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from mixed_data import KINDS, Mixture, mixture
from toy import Toy

from mtl_rcnn.balancing import WeightedSum
from mtl_rcnn.data.loader import build_train_loader
from mtl_rcnn.data.mixed_plan import MixedPlanner
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.losses import reduce_losses
from mtl_rcnn.engine.train import distribute

Arrangement = tuple[tuple[str, ...], tuple[str, ...]]
"""The kinds of data set whose images each of the two ranks gets."""


def arrangements() -> list[Arrangement]:
    """Every pair of kinds on the two ranks with one image each; every way to deal one image of each kind to them; and a
    rank that has nothing but images of one kind, twice, beside all others. The ranks are alike: not both ways round."""
    names = list(KINDS)
    half = len(names) // 2
    dealt = [(part, _without(part)) for part in combinations(names, half) if names[0] in part or len(names) % 2]
    alone = [((name, name), _without((name,))) for name in names]
    return [((one,), (other,)) for one, other in combinations_with_replacement(names, 2)] + dealt + alone


def _without(part: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(name for name in KINDS if name not in part)


class Run:
    """Training steps of one rank.

    Args:
        mixed: network and data.
        ranks: two.
    """

    def __init__(self, mixed: Mixture, ranks: Ranks) -> None:
        self.mixed, self.ranks = mixed, ranks
        self.network = distribute(mixed.model, ranks)
        self.optimizer = torch.optim.SGD(mixed.model.parameters(), lr=1e-3, momentum=0.9)
        self.balancer = WeightedSum(mixed.model.loss_names(), {})

    def step(self, mine: list[Sample]) -> dict[str, float]:
        """One step on this rank's images; the losses over both ranks."""
        sums, _ = self.network(mine)
        reduced = reduce_losses(sums, mine, self.ranks)
        assert list(sums) == self.mixed.model.loss_names()
        assert not reduced.faulty_ranks
        self.optimizer.zero_grad()
        self.balancer(reduced.losses, reduced.values, reduced.valid).backward()
        assert all(p.grad is not None for p in self.mixed.model.parameters() if p.requires_grad)
        self.optimizer.step()
        return reduced.values


def arrange(run: Run) -> dict[Arrangement, dict[str, Any]]:
    """An iteration on every arrangement: its losses, and those of a single process at the same weights that has only
    the images of the task's own data sets."""
    results = {}
    for number, arrangement in enumerate(arrangements()):
        batches = [deal(run.mixed, kinds, number) for kinds in arrangement]
        expected = losses_of_own_data(run.mixed, batches[0] + batches[1]) if run.ranks.is_main else {}
        results[arrangement] = {"values": run.step(batches[run.ranks.rank]), "expected": expected}
    return results


def deal(mixed: Mixture, kinds: tuple[str, ...], number: int) -> list[Sample]:
    """One image of each kind, another one for another number; a kind that comes twice gives two."""
    places = Counter()
    samples = []
    for kind in kinds:
        samples.append(mixed.samples[kind][(number + places[kind]) % len(mixed.samples[kind])])
        places[kind] += 1
    return samples


def losses_of_own_data(mixed: Mixture, samples: list[Sample]) -> dict[str, float]:
    """Each task's losses in one process with the images of the data sets that label it, and no others."""
    found = {}
    for task in mixed.model.tasks():
        own = [sample for sample in samples if task.name in KINDS[sample["dataset"]].tasks]
        with torch.no_grad():
            sums = mixed.model(own)[0] if own else {}
        for part in task.loss_parts:
            name = f"{task.name}/{part}"
            value, count = sums.get(name, (torch.zeros(()), torch.ones(())))
            found[name] = float(value.double() / count.double().clamp(min=1))
    return found


def train(run: Run, steps: int) -> tuple[Counter, list[dict[str, float]]]:
    """Steps on batches as a mixture plans them; how often each (data set, image) came on both ranks."""
    datasets = run.mixed.datasets
    sizes = [[(record["height"], record["width"]) for record in dataset.records] for dataset in datasets]
    plan = MixedPlanner(sizes, np.full(len(sizes), 1 / len(sizes)), 4, 8, seed=3)
    records = [record for dataset in datasets for record in dataset.records]
    loader = iter(build_train_loader(records, run.mixed.mapper, plan, 0, run.ranks.rank, run.ranks.world))
    seen, values = Counter(), []
    for _ in range(steps):
        mine = next(loader)
        both: list[Any] = [None, None]
        dist.all_gather_object(both, [(sample["dataset"], sample["image_id"]) for sample in mine])
        seen.update(both[0] + both[1])
        values.append(run.step(mine))
    return seen, values


def main(root: str, folder: str) -> None:
    """Trains, and writes what came of it."""
    path = Path(root)
    toy = Toy(path, path / "images", path / "boxes.json", path / "points.json")
    with distributed("cpu", timeout_s=200) as ranks, fail_together(ranks):
        torch.set_num_threads(1)
        run = Run(mixture(toy), ranks)
        seen, values = train(run, max(18, 50 - len(arrangements())))
        results = {"arrangements": arrange(run), "seen": seen, "values": values}
        results["model"] = run.mixed.model.state_dict()
        torch.save(results, Path(folder) / f"rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
