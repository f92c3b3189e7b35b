"""The losses on the evaluation sets: whether a task overfits shows here before its metric falls."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import all_reduce_sum
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet, evaluation_mode
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def validation_losses(network: MultiTaskRCNN, sets: Sequence[EvaluationSet], seed: int) -> dict[str, Metric]:
    """Losses of every set that has labels, over all ranks. Every rank must call this; every rank gets the same.

    The network is in evaluation mode: batch norm uses its own statistics, and proposals are as many as at test time.
    Regions and anchors are drawn by (seed, record), the same at every call, so that values of different iterations
    compare. The network, its modes and all random generators are left as they were.

    Returns:
        "dataset/task/loss_<part>": sum over the set divided by the count over the set, unweighted; "dataset/task/loss":
        the sum of the task's parts. A part of which the set has no label has no value.
    """
    found: dict[str, Metric] = {}
    with evaluation_mode(network), _own_draws(seed, network.device):
        for entry in sets:
            if entry.labelled is not None:
                found |= _metrics(entry.name, *_totals(network, entry.labelled))
    return found


def _totals(network: MultiTaskRCNN, batches: Iterable[Sequence[Sample]]) -> tuple[list[str], Tensor]:
    """Names of the P loss parts, and (P, 2) sums and counts over all ranks."""
    names = network.loss_names()
    totals = torch.zeros(len(names), 2, dtype=torch.float64, device=network.device)
    for batch in batches:
        losses, _ = network.losses(batch)
        totals += torch.stack([torch.stack(losses[name]).double() for name in names])
    return names, all_reduce_sum(totals)


def _metrics(dataset: str, names: Sequence[str], totals: Tensor) -> dict[str, Metric]:
    found: dict[str, Metric] = {}
    tasks: dict[str, float] = {}
    for name, (total, count) in zip(names, totals.tolist()):
        task, part = name.split("/")
        if count > 0:
            found[f"{dataset}/{task}/loss_{part}"] = Metric(total / count, higher_is_better=False)
            tasks[task] = tasks.get(task, 0.0) + total / count
    return found | {f"{dataset}/{task}/loss": Metric(value, higher_is_better=False) for task, value in tasks.items()}


@contextmanager
def _own_draws(seed: int, device: torch.device) -> Iterator[None]:
    """Torch's generators start from `seed` inside, and go on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
