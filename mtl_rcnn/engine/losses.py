"""From loss sums and counts on each rank to losses whose gradients, averaged over the ranks, are those of one
process."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mtl_rcnn.data.target import Sample, valid_mask
from mtl_rcnn.engine.distributed import Ranks, all_reduce_sum
from mtl_rcnn.modeling.meta_arch import Losses


@dataclass(frozen=True)
class ReducedLosses:
    """Losses of one step.

    Attributes:
        losses: "task/part" -> sum * world / max(count over ranks, 1): what this rank back-propagates. DDP's mean
            over the ranks of its gradient is the gradient of the global sum divided by the global count.
        values: "task/part" -> global sum / global count, the same on every rank, for the log.
        valid: task -> whether any image of the global batch is labelled for it.
        faulty_ranks: ranks on which some sum is not finite.
    """

    losses: dict[str, Tensor]
    values: dict[str, float]
    valid: dict[str, bool]
    faulty_ranks: list[int]


def reduce_losses(sums: Losses, samples: Sequence[Sample], ranks: Ranks) -> ReducedLosses:
    """Forms the losses of this step with one reduction over the ranks. Every rank has the same keys, whatever its
    labels.

    Args:
        sums: {"task/part": (sum, count)} of this rank.
        samples: this rank's images.
    """
    names = list(sums)
    tasks = list(dict.fromkeys(name.split("/")[0] for name in names))
    local_sums = torch.stack([sums[name][0].detach().double() for name in names])
    counts = torch.stack([sums[name][1].detach().double() for name in names])
    labelled = torch.stack([valid_mask(samples, task).sum() for task in tasks]).to(counts)
    faults = torch.zeros(ranks.world, dtype=torch.float64, device=counts.device)
    faults[ranks.rank] = float(not bool(torch.isfinite(local_sums).all()))
    # A sum that is not finite must not hide the ranks it came from.
    reduced = all_reduce_sum(torch.cat([counts, torch.nan_to_num(local_sums), labelled, faults]))
    counts, totals, labelled, faults = reduced.split([len(names), len(names), len(tasks), ranks.world])
    counts = counts.clamp(min=1)
    return ReducedLosses(
        losses={
            name: sums[name][0] * ranks.world / count.to(sums[name][0].dtype) for name, count in zip(names, counts)
        },
        values=dict(zip(names, (totals / counts).tolist())),
        valid=dict(zip(tasks, (labelled > 0).tolist())),
        faulty_ranks=torch.nonzero(faults).flatten().tolist(),
    )


def faulty_parts(sums: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The parts whose sum is not finite, with it."""
    return {name: float(value) for name, (value, _) in sums.items() if not bool(torch.isfinite(value))}
