"""What a training run will need, before it is queued. `tools/plan.py` and tests call `plan`.

A few steps are run here, for each share of the batch that a rank would have, on the run's own images; the rest is
arithmetic: `mtl_rcnn.engine.forecast`.
"""

from __future__ import annotations

import logging
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import Tensor, nn

from mtl_rcnn.config.durations import in_iterations
from mtl_rcnn.data.catalog import Dataset
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import build_mapper, epoch_length, train_datasets, train_loader, val_datasets
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.forecast import Costs, Forecast, Links, Run, forecast
from mtl_rcnn.engine.freeze import freeze
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.train import resolved
from mtl_rcnn.engine.trainer import PRECISIONS, Trainer
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

logger = logging.getLogger(__name__)

_WARM_UP = 2
_EVALUATED = 6


@dataclass(frozen=True)
class Memory:
    """Bytes on one GPU, with the largest share of the batch.

    Attributes:
        weights, gradients, optimizer: of the network; `optimizer` with the average of the weights, if there is one.
        buckets: copies of the gradients in which DDP sends them; 0 with one rank.
        activations: kept by the forward pass of a micro-batch for the backward pass.
        measured: most that PyTorch had in use at once, without the buckets; None where there was no GPU.
    """

    weights: int
    gradients: int
    optimizer: int
    buckets: int
    activations: int
    measured: int | None

    @property
    def total(self) -> int:
        """What is known to be needed."""
        parts = self.weights + self.gradients + self.optimizer + self.activations
        return self.buckets + (parts if self.measured is None else self.measured)


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
        bench = _Bench(cfg, datasets, label_space, ranks)
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


class _Bench:
    """The network, and some steps of it."""

    def __init__(self, cfg: DictConfig, datasets: list[Dataset], label_space: LabelSpace, ranks: Ranks) -> None:
        self.cfg, self.datasets, self.label_space, self.ranks = cfg, datasets, label_space, ranks
        self.targets = build_targets(cfg, label_space)
        layout = torch.channels_last if cfg.model.channels_last else torch.contiguous_format
        self.model: MultiTaskRCNN = build_model(cfg, label_space).to(ranks.device, memory_format=layout).train()
        freeze(self.model, cfg.solver.freeze)
        self.optimizer = build_optimizer(self.model, cfg.solver)
        self.val = val_datasets(cfg, label_space)
        self.evaluated = sum(len(dataset.records) for dataset in self.val)
        self._read = self._seconds = 0.0

    def costs(self, shares: Sequence[int]) -> Costs:
        """Of shares of the batch, in images."""
        given = self.cfg.seconds_per_image
        steps = {share: self._step(share) for share in shares}  # run all the same: the memory is to be known
        if given is not None:
            steps = {share: given * share for share in shares}
        read = self._seconds / max(self._read, 1)
        return Costs(steps, read, self._evaluation_seconds(), _bytes(self._learning()))

    def memory(self, share: int, ranks: int) -> Memory:
        """With a share of the batch, after `costs`."""
        learning = _bytes(self._learning())
        average = _bytes(self.model.parameters()) if self.cfg.solver.ema is not None else 0
        on_gpu = self.ranks.device.type == "cuda"
        return Memory(
            weights=_bytes([*self.model.parameters(), *self.model.buffers()]),
            gradients=learning,
            optimizer=_bytes(_tensors(self.optimizer.state_dict())) + average,
            buckets=learning if ranks > 1 else 0,
            activations=self._activations(share // self.cfg.solver.accumulate),
            measured=torch.cuda.max_memory_allocated(self.ranks.device) if on_gpu else None,
        )

    def state_bytes(self) -> int:
        """Of the tensors of a checkpoint, after `costs`."""
        copies = 1 if self.cfg.solver.ema is None else 2
        return copies * _bytes(self.model.state_dict().values()) + _bytes(_tensors(self.optimizer.state_dict()))

    def _step(self, share: int) -> float:
        """Median seconds of a step with `share` images."""
        number = _WARM_UP + self.cfg.steps
        trainer = self._trainer(share, self._batches(share, number))
        seconds = []
        for trainer.iter in range(number):
            begin = time.perf_counter()
            trainer.run_step()
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
            seconds.append(time.perf_counter() - begin)
        logger.info("%d images: %.3f s a step", share, statistics.median(seconds[_WARM_UP:]))
        return statistics.median(seconds[_WARM_UP:])

    def _batches(self, share: int, number: int) -> list[list[Sample]]:
        """Of the run's training data, read now."""
        own = OmegaConf.merge(self.cfg, {"solver": {"batch_size": share, "accumulate": 1}, "data": {"workers": 0}})
        begin = time.perf_counter()
        batches = list(islice(train_loader(own, self.datasets, self.targets, 0, self.ranks), number))
        self._seconds += time.perf_counter() - begin
        self._read += sum(map(len, batches))
        return batches

    def _trainer(self, share: int, batches: list[list[Sample]]) -> Trainer:
        """At a rate that changes next to nothing."""
        cfg = self.cfg
        balancer = build_balancer(cfg, self.model, None)
        share_gradients(balancer, self.model, self.ranks, cfg.solver)
        return Trainer(
            self.model,
            balancer,
            self.optimizer,
            LrSchedule(lr=1e-9, max_iter=len(batches)),
            iter(batches),
            self.ranks,
            PRECISIONS[cfg.solver.precision],
            cfg.solver.clip_gradients,
            Stopwatch(share, len(batches), self.ranks.device),
            (Path(cfg.output_dir) / "failures", OmegaConf.to_container(cfg, resolve=True), self.label_space),
            cfg.solver.accumulate,
        )

    def _activations(self, images: int) -> int:
        """Bytes that a forward pass keeps for the backward pass, the parameters themselves aside."""
        own = {parameter.untyped_storage().data_ptr() for parameter in self.model.parameters()}
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return tensor

        precision = PRECISIONS[self.cfg.solver.precision]
        autocast = torch.autocast(
            self.ranks.device.type, dtype=precision or torch.bfloat16, enabled=precision is not None
        )
        (batch,) = self._batches(images, 1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), autocast:
            sums = self.model(batch)  # its graph lives until all is counted
            total = sum(kept.values())
        del sums
        return total

    def _learning(self) -> list[nn.Parameter]:
        return [parameter for parameter in self.model.parameters() if parameter.requires_grad]

    def _evaluation_seconds(self) -> float:
        """Median of the network on one image of the first evaluation set; 0 without one."""
        if not self.val:
            return 0.0
        mapper = build_mapper(self.cfg, {}, training=False)
        samples = [mapper(record, index) for index, record in enumerate(islice(self.val[0].records, _EVALUATED))]
        self.model.eval()
        seconds = []
        for sample in [samples[0], *samples]:  # the first warms up
            begin = time.perf_counter()
            self.model.predict_tensors([sample["image"]], [torch.tensor([sample["height"], sample["width"]])])
            if self.ranks.device.type == "cuda":
                torch.cuda.synchronize(self.ranks.device)
            seconds.append(time.perf_counter() - begin)
        self.model.train()
        return statistics.median(seconds[1:])


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


def _tensors(value: Any) -> list[Tensor]:
    """All that lie in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _range(values: Sequence[float], digits: int) -> str:
    low, high = (f"{value:.{digits}f}" for value in values)
    return low if low == high else f"{low} - {high}"


def _gigabytes(number: int) -> str:
    return f"{number / 1e9:.2f} GB" if number >= 1e8 else f"{number / 1e6:.1f} MB"
