"""From loss sums and counts on each rank to losses whose gradients, averaged over the ranks, are those of one
process."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
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
            over the ranks of its gradient is the gradient of the global sum divided by the global count. With further
            micro-batches the sum is over all of them, but only the first one's has a gradient: see `further`.
        values: "task/part" -> global sum / global count, the same on every rank, for the log.
        valid: task -> whether it trains and any image of the global batch is labelled for it.
        faulty_ranks: ranks on which some sum is not finite.
        scales: "task/part" -> world / max(count, 1), () tensors.
        stop: whether any rank asked for the end of the training.
    """

    losses: dict[str, Tensor]
    values: dict[str, float]
    valid: dict[str, bool]
    faulty_ranks: list[int]
    scales: dict[str, Tensor]
    stop: bool

    def further(self, sums: Losses, weights: Mapping[str, float]) -> Tensor:
        """What another micro-batch of this rank adds to the scalar that is minimised.

        Only its gradient means anything: that of sum_i w_i L_i.

        Args:
            sums: of the micro-batch.
            weights: w_i by "task/part", the balancer's derivatives with respect to the whole batch's losses.
        """
        return torch.stack([sums[name][0] * self.scales[name] * weight for name, weight in weights.items()]).sum()


def reduce_losses(
    sums: Losses,
    samples: Sequence[Sample],
    ranks: Ranks,
    others: Sequence[Losses] = (),
    resting: Collection[str] = (),
    stop: bool = False,
) -> ReducedLosses:
    """Forms the losses of this step with one reduction over the ranks. Every rank has the same keys, whatever its
    labels.

    Args:
        sums: {"task/part": (sum, count)} of this rank, of its first micro-batch if there are several.
        samples: this rank's images, of all micro-batches.
        others: sums and counts of its other micro-batches, without gradients.
        resting: tasks that do not train in this step.
        stop: whether this rank asks for the end of the training.
    """
    names = list(sums)
    tasks = list(dict.fromkeys(name.split("/")[0] for name in names))
    own = {name: _add([losses[name] for losses in (sums, *others)]) for name in names}
    local_sums = torch.stack([own[name][0].detach().double() for name in names])
    counts = torch.stack([own[name][1].detach().double() for name in names])
    labelled = torch.stack([valid_mask(samples, task).sum() for task in tasks]).to(counts)
    faults = torch.zeros(ranks.world, dtype=torch.float64, device=counts.device)
    faults[ranks.rank] = float(not bool(torch.isfinite(local_sums).all()))
    # A sum that is not finite must not hide the ranks it came from.
    reduced = all_reduce_sum(
        torch.cat([counts, torch.nan_to_num(local_sums), labelled, faults, counts.new_tensor([stop])])
    )
    counts, totals, labelled, faults, stops = reduced.split([len(names), len(names), len(tasks), ranks.world, 1])
    counts = counts.clamp(min=1)
    losses = {name: own[name][0] * ranks.world / count.to(own[name][0].dtype) for name, count in zip(names, counts)}
    return ReducedLosses(
        losses=losses,
        values=dict(zip(names, (totals / counts).tolist())),
        valid={task: images > 0 and task not in resting for task, images in zip(tasks, labelled.tolist())},
        faulty_ranks=torch.nonzero(faults).flatten().tolist(),
        scales={name: (ranks.world / count).to(own[name][0].dtype) for name, count in zip(names, counts)},
        stop=bool(stops > 0),
    )


def _add(pairs: Sequence[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """The sum of the sums and of the counts; a single pair as it is."""
    total, count = pairs[0]
    for value, number in pairs[1:]:
        total, count = total + value, count + number
    return total, count


def faulty_parts(sums: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, float]:
    """The parts whose sum is not finite, with it."""
    return {name: float(value) for name, (value, _) in sums.items() if not bool(torch.isfinite(value))}
