"""What a run prints before its first step: what differs from the defaults, what is labelled, what learns, how fast."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
    shares: Mapping[str, float] | None = None,
) -> str:
    """Configuration against the defaults, dataset x task label table, the training sets' shares, repeated images,
    parameters by part, effective batch and learning rate.

    Args:
        epoch_length: training samples of an epoch, on average.
        repeats: of `data.repeat.repeat_report`.
        shares: of each training set in every batch, None where they follow from the images alone.
    """
    images = sum({row.dataset: row.images for row in labels}.values())
    parts = [
        "configuration, where it differs from the defaults:\n" + format_diff(config_diff(cfg)),
        "labels:\n" + label_report(labels),
        "mixture:\n" + mixture_report(cfg, labels, shares) if shares else "",
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


def mixture_report(cfg: DictConfig, labels: Sequence[LabelRow], shares: Mapping[str, float]) -> str:
    """What a mixture (`data.mixing`) means: of every training set and every task the share of a batch, and how often
    its images come in the whole run.

    A task's images are those that are labelled for it, of all training sets.
    """
    solver = cfg.solver
    images = {row.dataset: row.images for row in labels}
    drawn = {name: share * solver.batch_size * solver.max_iter for name, share in shares.items()}
    rows = [("dataset", name, share, drawn[name] / images[name]) for name, share in shares.items()]
    for task in dict.fromkeys(row.task for row in labels):
        own = [row for row in labels if row.task == task]
        part = sum(shares[row.dataset] * row.images_labelled / row.images for row in own)
        seen = sum(drawn[row.dataset] * row.images_labelled / row.images for row in own)
        rows.append(("task", task, part, seen / max(sum(row.images_labelled for row in own), 1)))
    return tabulate(
        [
            (kind, name, f"{share:.2%}", f"{share * solver.batch_size:.2f}", f"{epochs:.1f}")
            for kind, name, share, epochs in rows
        ],
        headers=("", "", "share", "images of a batch", "epochs of its own"),
        disable_numparse=True,
        colalign=("left", "left", "right", "right", "right"),
    )


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
