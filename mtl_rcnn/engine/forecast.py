"""How long a run will take on n nodes, from what was measured in one process: arithmetic with its assumptions.

- A step takes as long as the slowest of computing a rank's share of the batch and of its workers' reading it.
- The gradients are summed by a ring over all ranks (P. Patarasuk, X. Yuan, "Bandwidth optimal all-reduce algorithms for
  clusters of workstations", 2009): each rank sends 2 (N - 1) / N of their bytes over the slowest link of the ring, in
  2 (N - 1) messages for each of DDP's buckets.
- DDP sends while the backward pass still computes. How much of it hides is not known: both ends are told, all of it
  hidden as far as the step is long, and none.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

__all__ = ["Costs", "Forecast", "Links", "Run", "all_reduce_seconds", "forecast"]

BUCKET_BYTES = 25 * 2**20
"""Of gradients that DDP sends at once (`bucket_cap_mb`, its default)."""


@dataclass(frozen=True)
class Links:
    """What a ring gets out of the cluster's links.

    Attributes:
        within_node, between_nodes: bytes per second in one direction.
        latency: seconds of a message.
    """

    within_node: float
    between_nodes: float
    latency: float


@dataclass(frozen=True)
class Costs:
    """What one process measured.

    Attributes:
        step_seconds: images of a rank -> seconds of a step without waiting for data.
        load_seconds: of one worker, for one training image.
        evaluation_seconds: of the network, for one image of the evaluation sets.
        gradient_bytes: of what is summed over the ranks in each step.
    """

    step_seconds: Mapping[int, float]
    load_seconds: float
    evaluation_seconds: float
    gradient_bytes: int


@dataclass(frozen=True)
class Run:
    """What is to be run.

    Attributes:
        batch_size: images of a step over all ranks.
        iterations: of the schedule.
        epoch_images: training samples of an epoch.
        evaluated_images: of all evaluation sets.
        evaluations: number of them.
        workers: that read for each rank; 0: the rank reads itself, and computes nothing meanwhile.
    """

    batch_size: int
    iterations: int
    epoch_images: float
    evaluated_images: int
    evaluations: int
    workers: int


@dataclass(frozen=True)
class Forecast:
    """A run on some nodes. Ranges are (all communication hidden, none hidden).

    Attributes:
        nodes, ranks: number of them.
        share: images of a rank in each step.
        step_seconds: a range.
        communication_seconds: of each step.
        bound: what a step waits for if no communication hides: "computing", "reading" or "communicating".
        epoch_seconds: of training, a range.
        hours: of the whole run with its evaluations, a range.
    """

    nodes: int
    ranks: int
    share: int
    step_seconds: tuple[float, float]
    communication_seconds: float
    bound: str
    epoch_seconds: tuple[float, float]
    hours: tuple[float, float]


def all_reduce_seconds(size: int, nodes: int, ranks: int, links: Links) -> float:
    """Seconds of summing `size` bytes over all ranks by a ring, in DDP's buckets."""
    if ranks == 1:
        return 0.0
    bandwidth = links.within_node if nodes == 1 else min(links.within_node, links.between_nodes)
    buckets = max(1, math.ceil(size / BUCKET_BYTES))
    return 2 * (ranks - 1) / ranks * size / bandwidth + buckets * 2 * (ranks - 1) * links.latency


def forecast(costs: Costs, run: Run, nodes: int, ranks: int, links: Links) -> Forecast:
    """The run on `ranks` processes, equally many on each node. Raises KeyError for a share that was not measured."""
    share = run.batch_size // ranks
    computing = costs.step_seconds[share]
    reading = share * costs.load_seconds / max(run.workers, 1)
    alone = max(computing, reading) if run.workers else computing + reading
    communicating = all_reduce_seconds(costs.gradient_bytes, nodes, ranks, links)
    step = (max(alone, communicating), alone + communicating)
    per_epoch = run.epoch_images / run.batch_size
    read = costs.load_seconds / max(run.workers, 1)  # an image is read for evaluation as for training
    image = max(costs.evaluation_seconds, read) if run.workers else costs.evaluation_seconds + read
    evaluating = run.evaluations * run.evaluated_images / ranks * image
    parts = {"computing": computing, "reading": reading, "communicating": communicating}
    return Forecast(
        nodes,
        ranks,
        share,
        step,
        communicating,
        max(parts, key=parts.__getitem__),
        (step[0] * per_epoch, step[1] * per_epoch),
        ((step[0] * run.iterations + evaluating) / 3600, (step[1] * run.iterations + evaluating) / 3600),
    )
