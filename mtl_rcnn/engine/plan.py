"""What a training run will need, before it is queued. `tools/plan.py` and tests call `plan`.

A few steps are run here, for each share of the batch that a rank would have, on the run's own images; the rest is
arithmetic: `mtl_rcnn.engine.forecast`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from omegaconf import DictConfig
from tabulate import tabulate

from mtl_rcnn.config.durations import in_iterations
from mtl_rcnn.engine.data import epoch_length, train_datasets
from mtl_rcnn.engine.distributed import distributed
from mtl_rcnn.engine.forecast import Costs, Forecast, Links, Run, forecast
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.engine.step_costs import Bench, Memory
from mtl_rcnn.engine.train import resolved
from mtl_rcnn.errors import ConfigError


@dataclass(frozen=True)
class Disk:
    """What checkpoints take.

    Attributes:
        checkpoint_bytes: of one.
        kept: at most as many lie in the run's directory at once.
        written: in the whole run, the best ones aside.
    """

    checkpoint_bytes: int
    kept: int
    written: int


@dataclass(frozen=True)
class Plan:
    """What `plan` found.

    Attributes:
        forecasts: one per number of nodes whose ranks can share the batch.
        refused: number of nodes -> why not.
        memory, disk, costs: see there.
        iterations: of the schedule on one node.
        device: where it was measured.
    """

    forecasts: tuple[Forecast, ...]
    refused: Mapping[int, str]
    memory: Memory
    disk: Disk
    costs: Costs
    iterations: int
    device: str


def plan(cfg: DictConfig) -> Plan:
    """Measures a few steps of a training configuration and prints what the run will need.

    Raises:
        MtlRcnnError: a configuration or data that cannot be trained; no number of nodes that can share the batch.
    """
    cfg = resolved(cfg)
    with distributed(cfg.device) as ranks:
        if ranks.world > 1:
            raise ConfigError(f"a plan is made by one process, and these are {ranks.world}; start it without torchrun")
        setup_logging(None, ranks)
        if cfg.threads:
            torch.set_num_threads(cfg.threads)
        datasets, label_space = train_datasets(cfg)
        epoch_images = epoch_length(cfg, datasets)
        shares, refused = _shares(cfg)
        bench = Bench(cfg, datasets, label_space, ranks)
        costs = bench.costs(sorted(set(shares.values())))
        runs = {nodes: _run(cfg, nodes, epoch_images, bench.evaluated) for nodes in shares}
        found = Plan(
            tuple(
                forecast(costs, run, nodes, nodes * cfg.gpus_per_node, _links(cfg.links)) for nodes, run in runs.items()
            ),
            refused,
            bench.memory(max(shares.values()), max(shares) * cfg.gpus_per_node),
            _disk(in_iterations(cfg, epoch_images), bench.state_bytes()),
            costs,
            in_iterations(cfg, epoch_images).solver.max_iter,
            str(ranks.device),
        )
    print(as_text(found))
    return found


def as_text(found: Plan) -> str:
    """The plan in tables, and what it takes for granted."""
    rows = [
        (
            row.nodes,
            row.ranks,
            row.share,
            _range(row.step_seconds, 3),
            f"{row.communication_seconds:.3f}",
            row.bound,
            _range([seconds / 60 for seconds in row.epoch_seconds], 1),
            _range(row.hours, 1),
        )
        for row in found.forecasts
    ]
    heads = ("nodes", "GPUs", "images/GPU", "s/step", "of it sending", "longest", "min/epoch", "hours in all")
    memory, disk = found.memory, found.disk
    parts = {
        "weights": memory.weights,
        "gradients": memory.gradients,
        "optimizer, average": memory.optimizer,
        "DDP's copies of the gradients": memory.buckets,
        "activations": memory.activations,
    }
    in_parts = ", ".join(f"{name} {_gigabytes(size)}" for name, size in parts.items())
    measured = "" if memory.measured is None else f"; {_gigabytes(memory.measured)} measured without DDP's copies"
    return "\n".join(
        [
            f"{found.iterations} iterations on one node, measured on {found.device}",
            "",
            tabulate(rows, headers=heads, disable_numparse=True, colalign=("right",) * len(heads)),
            *(f"{nodes} nodes: {reason}" for nodes, reason in found.refused.items()),
            "",
            f"memory of a GPU: {_gigabytes(memory.total)} ({in_parts}{measured})",
            "                 workspaces, fragments and CUDA's own come on top",
            f"disk: {_gigabytes(disk.checkpoint_bytes)} a checkpoint, {disk.kept} kept at most = "
            f"{_gigabytes(disk.checkpoint_bytes * disk.kept)}, {disk.written} written",
            f"reading: {1000 * found.costs.load_seconds:.1f} ms an image and worker; evaluation: "
            f"{1000 * found.costs.evaluation_seconds:.1f} ms an image, scoring not counted",
            "s/step from - to: with communication hidden as far as the step is long, and not hidden at all",
        ]
    )


def _shares(cfg: DictConfig) -> tuple[dict[int, int], dict[int, str]]:
    """Number of nodes -> images of a rank, and why others cannot be. ConfigError if none can."""
    shares: dict[int, int] = {}
    refused: dict[int, str] = {}
    for nodes in cfg.nodes:
        parts = nodes * cfg.gpus_per_node * cfg.solver.accumulate
        batch = _batch_size(cfg, nodes)
        if batch % parts == 0:
            shares[nodes] = batch // (nodes * cfg.gpus_per_node)
        else:
            refused[nodes] = (
                f"a batch of {batch} cannot be shared by {nodes * cfg.gpus_per_node} GPUs"
                + (f" x {cfg.solver.accumulate} micro-batches" if cfg.solver.accumulate > 1 else "")
                + "; change solver.batch_size, or let it grow (batch_per_node=true)"
            )
    if not shares:
        raise ConfigError("nodes, gpus_per_node: " + "; ".join(f"{n} nodes: {why}" for n, why in refused.items()))
    return shares, refused


def _batch_size(cfg: DictConfig, nodes: int) -> int:
    return cfg.solver.batch_size * (nodes if cfg.batch_per_node else 1)


def _run(cfg: DictConfig, nodes: int, epoch_images: float, evaluated: int) -> Run:
    solver = in_iterations(cfg, epoch_images).solver
    grown = nodes if cfg.batch_per_node else 1
    evaluations = _times(solver.eval_period, solver.max_iter) if evaluated else 0
    iterations = -(-solver.max_iter // grown)
    return Run(solver.batch_size * grown, iterations, epoch_images, evaluated, evaluations, cfg.data.workers)


def _disk(cfg: DictConfig, size: int) -> Disk:
    last, period, every = cfg.solver.max_iter, cfg.solver.checkpoint_period, cfg.checkpoint.keep_every
    saved = {last, *(range(period, last, period) if period else ())}
    for_good = set(range(every, last + 1, every)) if every else set()
    passing = len((saved | for_good) - for_good)
    best = sum("early_stop" in node for node in cfg.solver.task_schedule.values()) + bool(cfg.data.val)
    return Disk(size, min(cfg.checkpoint.keep, passing) + len(for_good) + best, len(saved | for_good))


def _times(period: int, last: int) -> int:
    """How often something happens every `period` iterations (0: never) and after the last."""
    return 1 if period <= 0 else -(-last // period)


def _links(links: DictConfig) -> Links:
    return Links(1e9 * links.within_node, 1e9 * links.between_nodes, 1e-6 * links.latency_us)


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in values)
    return low if low == high else f"{low} - {high}"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
