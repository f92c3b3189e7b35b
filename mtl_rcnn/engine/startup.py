"""What a run prints before its first step: what differs from the defaults, what is labelled, what learns, how fast."""

from __future__ import annotations

from collections.abc import Sequence

from omegaconf import DictConfig
from tabulate import tabulate
from torch import nn

from mtl_rcnn.config.diff import config_diff, format_diff
from mtl_rcnn.data.coverage import LabelRow
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.schedule import effective_lr
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def startup_report(
    cfg: DictConfig,
    labels: Sequence[LabelRow],
    model: MultiTaskRCNN,
    ranks: Ranks,
    epoch_length: float,
    repeats: str = "",
) -> str:
    """Configuration against the defaults, dataset x task label table, repeated images, parameters by part, effective
    batch and learning rate.

    Args:
        epoch_length: training samples of an epoch, on average.
        repeats: of `data.repeat.repeat_report`.
    """
    images = sum({row.dataset: row.images for row in labels}.values())
    parts = [
        "configuration, where it differs from the defaults:\n" + format_diff(config_diff(cfg)),
        "labels:\n" + label_report(labels),
        "repeats:\n" + repeats if repeats else "",
        "parameters:\n" + parameter_report(model),
        schedule_report(cfg, images, ranks, epoch_length),
    ]
    return "\n\n".join(part for part in parts if part)


def label_report(labels: Sequence[LabelRow]) -> str:
    """One line per dataset and task: images and instances that carry the task's labels, of all."""
    rows = [
        (row.dataset, row.task, f"{row.images_labelled} / {row.images}", f"{row.instances_labelled} / {row.instances}")
        for row in labels
    ]
    return tabulate(rows, headers=("dataset", "task", "images labelled", "instances labelled"), colalign=("left",) * 4)


def parameter_report(model: MultiTaskRCNN) -> str:
    """Trainable and frozen parameters of the trunk and of each task."""
    rows = [(name, *_count(module)) for name, module in model.parts().items()]
    rows.append(("all", *_count(model)))
    return tabulate(
        [(name, f"{t:,}", f"{f:,}") for name, t, f in rows],
        headers=("part", "trainable", "frozen"),
        disable_numparse=True,
        colalign=("left", "right", "right"),
    )


def schedule_report(cfg: DictConfig, images: int, ranks: Ranks, epoch_length: float) -> str:
    """The batch, the learning rate and the length of the run in one line."""
    solver = cfg.solver
    share = solver.batch_size // ranks.world // solver.accumulate
    parts = f" x {solver.accumulate} micro-batches" if solver.accumulate > 1 else ""
    epochs = solver.max_iter * solver.batch_size / max(epoch_length, 1)
    whole = f"{images} images" if epoch_length == images else f"{epoch_length:.1f} samples ({images} images)"
    meant = solver.reference_batch_size
    rate = f"lr {effective_lr(solver):g}" + (f" ({solver.lr:g} at a batch of {meant})" if meant is not None else "")
    return (
        f"batch {ranks.world} ranks{parts} x {share} images = {solver.batch_size}, {rate}, {solver.max_iter} "
        f"iterations "
        f"= {epochs:.1f} epochs of {whole}, {solver.precision}, {ranks.device.type}"
    )


def _count(module: nn.Module) -> tuple[int, int]:
    parameters = list(module.parameters())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    return trainable, sum(p.numel() for p in parameters) - trainable
