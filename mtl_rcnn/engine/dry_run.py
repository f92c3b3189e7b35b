"""A training run in seconds: does every task's gradient arrive, does its loss fall on one batch, what will it cost?"""

from __future__ import annotations

import heapq
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import repeat
from pathlib import Path
from statistics import fmean

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mtl_rcnn.config.durations import in_iterations
from mtl_rcnn.data.catalog import Dataset
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record, Sample, Target
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.data import build_mapper
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.freeze import freeze
from mtl_rcnn.engine.losses import faulty_parts, reduce_losses
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.train import distribute
from mtl_rcnn.engine.trainer import PRECISIONS, Trainer
from mtl_rcnn.errors import TrainingError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

_PROBE = {"optimizer": "adamw", "lr": 1e-3, "reference_batch_size": None, "weight_decay": 0.0, "clip_gradients": 10.0}
"""What learns one batch, whatever the run's own schedule: that starts too gently to show anything in a few steps."""


@dataclass(frozen=True)
class TaskProbe:
    """What a task did.

    Attributes:
        task: its name.
        labelled: whether any image of the batch is labelled for it; nothing else is known where none is.
        first, last: its loss at the first step, and the mean of the last few.
        fault: what is wrong, "" if nothing is.
        learns: whether anything that its loss follows from learns, which is not so if trunk and task are frozen.
    """

    task: str
    labelled: bool
    first: float
    last: float
    fault: str = ""
    learns: bool = True


@dataclass(frozen=True)
class DryRun:
    """What a few steps on one batch told.

    Attributes:
        images: of the batch, `steps` on it.
        tasks: one per task.
        step_seconds: of a step with this batch, the first steps aside.
        schedule_seconds: of the whole schedule on this machine in one process, at the same time per image.
        memory_bytes: most memory so far (PyTorch's tensors on a GPU, else this process); None where it is not known.
        device: where it ran.
    """

    images: int
    steps: int
    tasks: tuple[TaskProbe, ...]
    step_seconds: float
    schedule_seconds: float
    memory_bytes: float | None
    device: str

    @property
    def faults(self) -> list[str]:
        """What is wrong, by task."""
        return [f"{probe.task}: {probe.fault}" for probe in self.tasks if probe.fault]


def dry_run(
    cfg: DictConfig,
    datasets: Sequence[Dataset],
    targets: Mapping[str, Target],
    label_space: LabelSpace,
    images: int,
    steps: int,
    folder: Path,
) -> DryRun:
    """Builds the network, sends each task's loss back alone, then learns one batch by heart for some steps.

    Args:
        cfg: a training configuration.
        datasets: its training sets, without faults.
        images: of the batch; the ones with most kinds of labels.
        steps: at least 1.
        folder: for a replay file, should a loss not be finite.

    Raises:
        MtlRcnnError: the configuration cannot be run.
    """
    with distributed(cfg.device, cfg.cluster.kind) as ranks:
        cfg = in_iterations(cfg, sum(len(dataset.records) for dataset in datasets))
        samples = _batch(cfg, datasets, targets, images)
        model = _model(cfg, label_space, ranks)
        probes = {probe.task: probe for probe in _gradients(model, samples, ranks)}
        if any(probe.fault for probe in probes.values()):
            return DryRun(len(samples), 0, tuple(probes.values()), 0.0, 0.0, None, str(ranks.device))
        watch = Stopwatch(len(samples), steps, ranks.device)
        trainer = _trainer(cfg, model, samples, label_space, steps, folder, ranks, watch)
        values = list(_overfit(trainer, steps))
    timings = watch.timings(steps)
    seconds = timings["iteration_s"]
    schedule = seconds / len(samples) * cfg.solver.batch_size * cfg.solver.max_iter
    tasks = tuple(_judged(probe, values) for probe in probes.values())
    memory = timings.get("memory_bytes")
    return DryRun(len(samples), steps, tasks, seconds, schedule, memory, str(ranks.device))


def _batch(cfg: DictConfig, datasets: Sequence[Dataset], targets: Mapping[str, Target], images: int) -> list[Sample]:
    """Samples of the records that carry the most tasks' labels, as training would load them."""
    records = (record for dataset in datasets for record in dataset.records)

    def richness(record: Record) -> tuple[int, int]:
        found = [target.check(record) for target in targets.values()]
        return sum(cover.instances > 0 or cover.image for cover in found), min(cover.instances for cover in found)

    chosen = heapq.nlargest(images, records, key=richness)
    mapper = build_mapper(cfg, targets, training=True)
    return [mapper(record, index) for index, record in enumerate(chosen)]


def _model(cfg: DictConfig, label_space: LabelSpace, ranks: Ranks) -> MultiTaskRCNN:
    layout = torch.channels_last if cfg.model.channels_last else torch.contiguous_format
    model = build_model(cfg, label_space).to(ranks.device, memory_format=layout)
    freeze(model, cfg.solver.freeze)
    if cfg.checkpoint.weights:
        load_initial_weights(cfg, model, label_space)
    return model


def _gradients(model: MultiTaskRCNN, samples: Sequence[Sample], ranks: Ranks) -> Iterator[TaskProbe]:
    """Forward once per task, and backward from its losses alone: they are finite, and reach its parameters."""
    model.train()
    for name, part in list(model.parts().items())[1:]:
        model.zero_grad(set_to_none=True)
        sums, _ = model(samples)
        own = {key: value for key, value in sums.items() if key.split("/")[0] == name}
        labelled = any(sample["labelled"].get(name, False) for sample in samples)
        loss = sum(reduce_losses(sums, samples, ranks).losses[key] for key in own)
        infinite = [f"loss {key} is {value}" for key, value in faulty_parts(own).items()]
        fault = ", ".join(infinite)
        if labelled and loss.requires_grad and not infinite:
            loss.backward()
            fault = _unreached(part, "its parameters") or _unreached(model.backbone, "the trunk")
        value = float(loss.detach())
        yield TaskProbe(name, labelled, value, value, fault, loss.requires_grad)
    model.zero_grad(set_to_none=True)


def _unreached(part: nn.Module, named: str) -> str:
    """What a backward pass left without gradient."""
    trainable = [(name, p) for name, p in part.named_parameters() if p.requires_grad]
    without = [name for name, parameter in trainable if parameter.grad is None]
    if without:
        return f"no gradient reaches {len(without)} of {named} ({', '.join(without[:3])} ...)"
    if trainable and not any(bool(parameter.grad.any()) for _, parameter in trainable):
        return f"all gradients of {named} are 0"
    return ""


def _trainer(
    cfg: DictConfig,
    model: MultiTaskRCNN,
    samples: list[Sample],
    label_space: LabelSpace,
    steps: int,
    folder: Path,
    ranks: Ranks,
    watch: Stopwatch,
) -> Trainer:
    solver = OmegaConf.merge(cfg.solver, _PROBE)
    schedule = LrSchedule(lr=float(solver.lr), max_iter=steps, name="multistep", warmup_iters=min(3, steps))
    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ranks, cfg.solver)
    return Trainer(
        distribute(model, ranks),
        balancer,
        build_optimizer(model, solver),
        replace(schedule, warmup_factor=0.3),
        repeat(samples),
        ranks,
        PRECISIONS[cfg.solver.precision],
        solver.clip_gradients,
        watch,
        (folder / "failures", OmegaConf.to_container(cfg, resolve=True), label_space),
    )


def _overfit(trainer: Trainer, steps: int) -> Iterator[dict[str, float]]:
    """The losses of each step, by "task/part"; ends early where one is not finite."""
    for trainer.iter in range(steps):
        try:
            trainer.run_step()
        except TrainingError:
            yield {name: float("nan") for name in trainer.network.loss_names()}
            return
        yield dict(trainer.scalars)


def _judged(probe: TaskProbe, values: Sequence[Mapping[str, float]]) -> TaskProbe:
    """The probe with what the task's loss did over the steps."""
    if not probe.labelled:
        return probe
    losses = [sum(v for name, v in step.items() if name.startswith(f"{probe.task}/")) for step in values]
    last = fmean(losses[-3:]) if len(losses) > 3 else losses[-1]
    fell = last < losses[0] or not probe.learns
    fault = "" if fell or len(losses) == 1 else f"its loss does not fall: {losses[0]:.4g} -> {last:.4g}"
    return replace(probe, first=losses[0], last=last, fault=fault)
