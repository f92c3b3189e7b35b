"""The training loop: Detectron2's loop and hooks around one step of this project's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from detectron2.engine import TrainerBase
from torch import nn

from mtl_rcnn.balancing import Scalarizer
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.ema import WeightAverage
from mtl_rcnn.engine.failures import is_lost_connection
from mtl_rcnn.engine.losses import ReducedLosses, faulty_parts, reduce_losses
from mtl_rcnn.engine.replay import part_of, save_replay
from mtl_rcnn.engine.schedule import LrSchedule, clip_gradients
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.task_analysis import Observation, TaskAnalysis, observed
from mtl_rcnn.engine.task_schedule import TaskSchedule
from mtl_rcnn.errors import MtlRcnnError, StepError, TrainingError
from mtl_rcnn.modeling.meta_arch import Losses
from mtl_rcnn.modeling.resting import unchanged_buffers

_NOT_FINITE = " (lower solver.lr or set solver.clip_gradients if no image is at fault)"
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Trainer(TrainerBase):
    """Trains a network; hooks do everything that is not a step.

    Args:
        model: the network, wrapped in DDP if there is more than one rank.
        balancer: combines the losses.
        optimizer, schedule: of the run.
        batches: this rank's batches, endless.
        ranks: this process among all.
        precision: autocast type of the forward pass, None for float32. Under float16 the loss is scaled, lest small
            gradients become 0, and a step whose gradients overflow changes no weight.
        clip: largest L2 norm of the whole gradient, None for no limit.
        watch: measures the steps.
        failure: what to save beside the batch when a step fails: folder, configuration, classes.
        accumulate: micro-batches into which this rank's share of a batch is cut; only one has its graph in memory.
        average: of the weights, kept up to date.
        draws: seed of what layers draw themselves, such as dropout, which is then a function of it and of the batch
            (docs/adr/0012); None leaves torch's generator alone.
        task_schedule: says which tasks train when; None: all of them always.
        analyse_every: iterations between looks at the tasks' gradients and costs; 0: none.
        told_to_stop: whether this process was; `stopping` says in every step whether any rank was.
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
        accumulate: int = 1,
        average: WeightAverage | None = None,
        draws: int | None = None,
        task_schedule: TaskSchedule | None = None,
        analyse_every: int = 0,
        told_to_stop: Callable[[], bool] = lambda: False,
    ) -> None:
        super().__init__()
        self.model, self.balancer, self.optimizer, self.schedule = model, balancer, optimizer, schedule
        self.batches, self.ranks, self.precision, self.clip = batches, ranks, precision, clip
        self.watch, self.failure, self.accumulate, self.average = watch, failure, accumulate, average
        self.draws, self.task_schedule, self.analyse_every = draws, task_schedule, analyse_every
        self._resting: frozenset[str] = frozenset()
        self._planned = 0
        self.told_to_stop, self.stopping = told_to_stop, False
        self.scaler = torch.amp.GradScaler(ranks.device.type, enabled=precision is torch.float16)
        self.scalars: dict[str, float] = {}
        """Values of the last step, for the log: total, losses, learning rate, gradient norm, under float16 the scale of
        the loss; the same on every rank."""
        self.analysis: TaskAnalysis | None = None
        """Of the last step, if it was one to look at; under accumulation, of the first micro-batch of every rank."""

    @property
    def network(self) -> nn.Module:
        """The network itself, without DDP."""
        return self.model.module if isinstance(self.model, nn.parallel.DistributedDataParallel) else self.model

    def train(self, start_iter: int, max_iter: int) -> None:
        """Trains from `start_iter` steps done to `max_iter`, until a hook lowers `self.max_iter`, or until any rank is
        told to stop: then `stopping` stays true."""
        self._planned = max_iter
        with suppress(_EndedEarly):
            super().train(start_iter, max_iter)

    def before_train(self) -> None:
        """Detectron2's hooks, and the end if one of them has said that there is nothing to train."""
        super().before_train()
        if self.stopping or self.iter >= self.max_iter:
            raise _EndedEarly

    def after_step(self) -> None:
        """Detectron2's hooks, and the end if one of them, now or earlier, has said that this step is the last."""
        super().after_step()
        if self.stopping or self.iter + 1 == self.max_iter < self._planned:
            raise _EndedEarly

    def run_step(self) -> None:
        """One batch: forward, losses over all ranks and micro-batches, balance, backward, update."""
        self.watch.begin()
        samples = next(self.batches)
        self.watch.batch_ready()
        lr = self.schedule.apply(self.optimizer, self.iter)
        factors = self.task_schedule.weights(self.iter) if self.task_schedule else {}
        self.balancer.scale(factors)
        self._resting = frozenset(task for task, factor in factors.items() if factor == 0)
        self.optimizer.zero_grad(set_to_none=True)
        with self._described(samples):
            reduced, logs = self._backward(samples)
        self._leave_resting_as_they_are()
        norm = self._update()
        self.balancer.step()
        if self.balancer.looks_again:
            self.balancer.seen_again(self._look_again(samples))
        weights = self.balancer.weights()
        weighted = {name: value * weights[name] for name, value in reduced.values.items()}
        values = {name: value for name, value in reduced.values.items() if name.split("/")[0] not in self._resting}
        self.scalars = {"total": sum(weighted.values()), **values, "lr": lr, "grad_norm": float(norm)}
        self.scalars |= self.balancer.scalars()
        if self.task_schedule is not None:
            self.scalars |= self.task_schedule.scalars(self.iter)
        if self.scaler.is_enabled():
            self.scalars["loss_scale"] = self.scaler.get_scale()
        if self.ranks.world == self.accumulate == 1:  # of a part of the batch they would mean something else
            self.scalars |= {name: float(value) for name, value in logs.items()}
        self.watch.end()

    def _backward(self, samples: list[Sample]) -> tuple[ReducedLosses, dict[str, torch.Tensor]]:
        """Adds up the gradients of one batch, cut into micro-batches, as if it were whole: docs/adr/0008.

        The losses' counts follow from the forward pass. All micro-batches but the first therefore run it twice: first
        without a graph, for their sums and counts, then, when the divisors are known, for their gradients. A balancer
        that looks ahead has every micro-batch run once more in between: docs/adr/0020.
        """
        parts = split(samples, self.accumulate)
        counted = [self._count(part) for part in parts[1:]]
        if counted and self.balancer.looks_ahead:
            reduced, logs = self._look_ahead(samples, parts, counted)
        else:
            with self._communicating(not counted):
                scalar, reduced, logs = self._balanced(self.model, samples, parts, counted)
                scalar.backward()
            parts = parts[1:]
        for index, part in enumerate(parts, 1):
            with self._communicating(index == len(parts)):
                self._further(self.model, part, reduced).backward()
        return reduced, logs

    def _look_ahead(
        self, samples: list[Sample], parts: list[list[Sample]], counted: list[Losses]
    ) -> tuple[ReducedLosses, dict[str, torch.Tensor]]:
        """Shows the balancer the tasks' gradients of every micro-batch; leaves none in any parameter, and no graph."""
        looking_ahead = self.network.split.looking_ahead(self.balancer.see)
        with unchanged_buffers(self.network), looking_ahead as look:
            scalar, reduced, logs = self._balanced(self.network, samples, parts, counted)
            look(scalar)
            for part in parts[1:]:
                look(self._further(self.network, part, reduced))
        return reduced, logs

    def _balanced(
        self, model: nn.Module, samples: list[Sample], parts: list[list[Sample]], counted: list[Losses]
    ) -> tuple[torch.Tensor, ReducedLosses, dict[str, torch.Tensor]]:
        """What the first micro-batch adds to the scalar that is minimised, scaled, with the losses of all."""
        with self._observed() as observation:
            sums, logs = self._forward(model, parts[0])
        reduced = reduce_losses(sums, samples, self.ranks, counted, self._resting, self.told_to_stop())
        self.stopping = reduced.stop
        if reduced.faulty_ranks:
            self._fail(parts, [sums, *counted])
        scalar = self.balancer(reduced.losses, reduced.values, reduced.valid)
        self.analysis = observation and observation.analyse(
            sums, reduced, self.balancer.weights(), self.ranks, self.scaler.get_scale()
        )
        return self.scaler.scale(scalar), reduced, logs

    def _further(self, model: nn.Module, samples: list[Sample], reduced: ReducedLosses) -> torch.Tensor:
        """What another micro-batch adds to it, scaled."""
        sums, _ = self._forward(model, samples)
        return self.scaler.scale(reduced.further(sums, self.balancer.weights()))

    def _leave_resting_as_they_are(self) -> None:
        """What has no gradient the optimizer passes over: neither weight decay nor momentum moves it."""
        for task in self.network.tasks():
            if task.name in self._resting:
                task.zero_grad(set_to_none=True)

    def _update(self) -> torch.Tensor:
        """One step of the optimizer; returns the gradient's norm, () and not finite where float16 overflowed."""
        self.scaler.unscale_(self.optimizer)
        norm = clip_gradients(self.network.parameters(), self.clip)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if self.average is not None:
            self.average.update(self.iter)
        return norm

    def _count(self, samples: Sequence[Sample]) -> Losses:
        """Sums and counts of a micro-batch; leaves no graph, and no trace in batch norm's statistics."""
        with torch.no_grad(), unchanged_buffers(self.network):
            return self._forward(self.network, samples)[0]

    def _look_again(self, samples: list[Sample]) -> dict[str, float]:
        """The losses of a batch over all ranks, with the weights as they are now; leaves no graph."""
        first, *others = [self._count(part) for part in split(samples, self.accumulate)]
        return reduce_losses(first, samples, self.ranks, others).values

    def _observed(self) -> AbstractContextManager[Observation | None]:
        due = self.analyse_every > 0 and (self.iter + 1) % self.analyse_every == 0
        return observed(self.network) if due else nullcontext()

    def _communicating(self, last: bool) -> AbstractContextManager[None]:
        """DDP sums gradients over the ranks only in the backward pass of the last micro-batch."""
        return nullcontext() if last or self.ranks.world == 1 else self.model.no_sync()

    def _forward(self, model: nn.Module, samples: Sequence[Sample]) -> tuple[Losses, dict[str, torch.Tensor]]:
        enabled = self.precision is not None
        if self.draws is not None:
            torch.manual_seed(_draw(self.draws, samples[0]["sample_index"]))
        try:
            with torch.autocast(self.ranks.device.type, dtype=self.precision or torch.bfloat16, enabled=enabled):
                return model(samples, self._resting)
        except FloatingPointError as error:
            # Proposals that are not finite stop this rank before the losses: the others learn of it through
            # `fail_together`.
            raise TrainingError(self._describe_failure(samples, str(error), _NOT_FINITE)) from error

    @contextmanager
    def _described(self, samples: list[Sample]) -> Iterator[None]:
        """An error that nobody foresaw, such as memory that is out or a fault in a task's code, becomes a `StepError`
        that says where it arose and with which images."""
        try:
            yield
        except MtlRcnnError:
            raise
        except Exception as error:
            if is_lost_connection(error):
                raise
            part = part_of(error, self.network)
            fault = f"{type(error).__name__}: {error}" + (f" (in {part})" if part else "")
            raise StepError(self._describe_failure(samples, fault)) from error

    def _fail(self, parts: list[list[Sample]], sums: list[Losses]) -> None:
        """Ends the run on every rank with one text that names the faulty ranks, losses and images."""
        texts = [""]
        for samples, faults in zip(parts, map(faulty_parts, sums)):
            if faults and not texts[0]:
                fault = ", ".join(f"loss {name} is {value}" for name, value in faults.items())
                texts = [self._describe_failure(samples, fault, _NOT_FINITE)]
        if self.ranks.world > 1:
            gathered: list[Any] = [None] * self.ranks.world
            dist.all_gather_object(gathered, texts[0])
            texts = [text for text in gathered if text]
        raise TrainingError(" | ".join(texts))

    def _describe_failure(self, samples: Sequence[Sample], fault: str, advice: str = "") -> str:
        folder, config, label_space = self.failure
        path = folder / f"iteration_{self.iter:07d}_rank_{self.ranks.rank}.pt"
        try:
            save_replay(path, self.network, samples, self.iter, config, label_space)
            again = f"see the step again with: python -m mtl_rcnn.engine.replay {path}"
        except Exception as error:  # the fault itself is the news
            again = f"the step cannot be saved to {path} ({type(error).__name__}: {error})"
        images = ", ".join(f"{sample['dataset']}/{sample['image_id']}" for sample in samples)
        rate = f"lr {self.schedule.at(self.iter):.3g}"
        return f"iteration {self.iter}, rank {self.ranks.rank}: {fault}; images: {images}; {rate}{advice}; {again}"


class _EndedEarly(BaseException):
    """Leaves Detectron2's loop, which knows no other end than its last iteration. Not an `Exception`: those it logs."""


def _draw(seed: int, sample_index: int) -> int:
    """A seed of torch's generators, of a batch by its first sample. A part of a batch that is seen twice, as under
    accumulation, draws the same twice."""
    return int(np.random.SeedSequence([seed, sample_index]).generate_state(1, np.uint64)[0] >> np.uint64(1))


def split(samples: list[Sample], number: int) -> list[list[Sample]]:
    """`samples` in order, as `number` micro-batches of equal size."""
    size = len(samples) // number
    return [samples[start : start + size] for start in range(0, size * number, size)]
