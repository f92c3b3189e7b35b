"""What a few steps and images of a training configuration cost in one process: seconds and bytes, for a plan."""

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
from torch import Tensor, nn

from mtl_rcnn.data.catalog import Dataset
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import build_mapper, train_loader, val_datasets
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.forecast import Costs
from mtl_rcnn.engine.freeze import freeze
from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.trainer import PRECISIONS, Trainer
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

__all__ = ["Bench", "Memory"]

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


class Bench:
    """The network of a configuration, and some steps of it.

    Args:
        cfg: of tools/plan.py.
        datasets, label_space: its training sets and their classes.
        ranks: this process, alone.
    """

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


def _tensors(value: Any) -> list[Tensor]:
    """All that lie in nested dicts and lists."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
