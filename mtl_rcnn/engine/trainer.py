"""The training loop: Detectron2's loop and hooks around one step of this project's own."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from torch import nn

from mtl_rcnn.balancing import Scalarizer
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.losses import faulty_parts, reduce_losses
from mtl_rcnn.engine.replay import save_replay
from mtl_rcnn.engine.schedule import LrSchedule, clip_gradients
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.errors import TrainingError
from mtl_rcnn.modeling.meta_arch import Losses

PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


class Trainer(TrainerBase):
    """Trains a network; hooks do everything that is not a step.

    Args:
        model: the network, wrapped in DDP if there is more than one rank.
        balancer: combines the losses.
        optimizer, schedule: of the run.
        batches: this rank's batches, endless.
        ranks: this process among all.
        precision: autocast type of the forward pass, None for float32.
        clip: largest L2 norm of the whole gradient, None for no limit.
        watch: measures the steps.
        failure: what to save beside the batch when a step fails: folder, configuration, classes.
    """

    def __init__(
        self,
        model: nn.Module,
        balancer: Scalarizer,
        optimizer: torch.optim.Optimizer,
        schedule: LrSchedule,
        batches: Iterator[list[Sample]],
        ranks: Ranks,
        precision: torch.dtype | None,
        clip: float | None,
        watch: Stopwatch,
        failure: tuple[Path, dict[str, Any], LabelSpace],
    ) -> None:
        super().__init__()
        self.model, self.balancer, self.optimizer, self.schedule = model, balancer, optimizer, schedule
        self.batches, self.ranks, self.precision, self.clip = batches, ranks, precision, clip
        self.watch, self.failure = watch, failure
        self.scalars: dict[str, float] = {}
        """Values of the last step, for the log: total, losses, learning rate, gradient norm; the same on every rank."""

    @property
    def network(self) -> nn.Module:
        """The network itself, without DDP."""
        return self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model

    def run_step(self) -> None:
        """One batch: forward, losses over all ranks, balance, backward, update."""
        self.watch.begin()
        samples = next(self.batches)
        self.watch.batch_ready()
        lr = self.schedule.apply(self.optimizer, self.iter)
        sums, logs = self._forward(samples)
        reduced = reduce_losses(sums, samples, self.ranks)
        if reduced.faulty_ranks:
            self._fail(samples, ", ".join(f"loss {name} is {value}" for name, value in faulty_parts(sums).items()))
        total = self.balancer(reduced.losses, reduced.valid)
        self.optimizer.zero_grad(set_to_none=True)
        total.backward()
        norm = clip_gradients(self.network.parameters(), self.clip)
        self.optimizer.step()
        weights = self.balancer.weights()
        weighted = {name: value * weights[name] for name, value in reduced.values.items()}
        self.scalars = {"total": sum(weighted.values()), **reduced.values, "lr": lr, "grad_norm": float(norm)}
        self.scalars |= {name: float(value) for name, value in logs.items()} if self.ranks.world == 1 else {}
        self.watch.end()

    def _forward(self, samples: Sequence[Sample]) -> tuple[Losses, dict[str, torch.Tensor]]:
        enabled = self.precision is not None
        try:
            with torch.autocast(self.ranks.device.type, dtype=self.precision or torch.bfloat16, enabled=enabled):
                return self.model(samples)
        except FloatingPointError as error:
            # Proposals that are not finite stop this rank before the losses: the others learn of it through
            # `fail_together`.
            raise TrainingError(self._describe_failure(samples, str(error))) from error

    def _fail(self, samples: Sequence[Sample], fault: str) -> None:
        """Ends the run on every rank with one text that names the faulty ranks, losses and images."""
        texts = [self._describe_failure(samples, fault) if fault else ""]
        if self.ranks.world > 1:
            gathered: list[Any] = [None] * self.ranks.world
            dist.all_gather_object(gathered, texts[0])
            texts = [text for text in gathered if text]
        raise TrainingError(" | ".join(texts))

    def _describe_failure(self, samples: Sequence[Sample], fault: str) -> str:
        folder, config, label_space = self.failure
        path = folder / f"iteration_{self.iter:07d}_rank_{self.ranks.rank}.pt"
        save_replay(path, self.network, samples, self.iter, config, label_space)
        images = ", ".join(f"{sample['dataset']}/{sample['image_id']}" for sample in samples)
        return (
            f"iteration {self.iter}, rank {self.ranks.rank}: {fault}; images: {images}; lr "
            f"{self.schedule.at(self.iter):.3g} "
            f"(lower solver.lr or set solver.clip_gradients if no image is at fault); "
            f"see the step again with: python -m mtl_rcnn.engine.replay {path}"
        )
