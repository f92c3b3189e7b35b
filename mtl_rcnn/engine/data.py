"""From the configuration to datasets, loaders and evaluation sets."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial

import numpy as np
import torch
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from torch.utils.data import ConcatDataset

from mtl_rcnn.data.catalog import Dataset, DatasetSpec, build_datasets
from mtl_rcnn.data.coverage import label_table
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.loader import Loader, build_eval_loader, build_train_loader
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.mixed_plan import MixedPlanner, mixing_shares
from mtl_rcnn.data.planner import BatchPlanner, Plan, check_world
from mtl_rcnn.data.repeat import image_repeat_factors, repeat_factors
from mtl_rcnn.data.target import Sample, Target
from mtl_rcnn.data.transforms import build_augmentations
from mtl_rcnn.data.views import ViewMapper, Views
from mtl_rcnn.engine.build import build_evaluators
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.machine import once_per_machine
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Evaluator
from mtl_rcnn.evaluation.inference import EvaluationSet


def dataset_specs(cfg: DictConfig, split: str) -> list[DatasetSpec]:
    """The datasets of a split ("train" or "val") as configured."""
    nodes = OmegaConf.to_container(cfg.data[split], resolve=True)
    for index, node in enumerate(nodes):
        if split == "val" and node.get("repeat", 1) != 1:
            raise ConfigError(f"data.val[{index}].repeat={node['repeat']}: evaluation sees every image once; remove it")
    return [DatasetSpec.from_config(node, where=f"data.{split}[{index}]") for index, node in enumerate(nodes)]


def train_datasets(cfg: DictConfig, ranks: Ranks | None = None) -> tuple[list[Dataset], LabelSpace]:
    """The training sets and the classes they span.

    Args:
        ranks: that all ask for them now: those of one machine read them once and share the records' memory. None reads
            them for this process alone.
    """
    return once_per_machine(
        partial(
            build_datasets,
            dataset_specs(cfg, "train"),
            dict(cfg.data.aliases),
            min_instances=cfg.data.min_instances,
            on_error=cfg.data.on_error,
        ),
        ranks,
    )


def val_datasets(cfg: DictConfig, label_space: LabelSpace, ranks: Ranks | None = None) -> list[Dataset]:
    """The evaluation sets, their classes mapped by name; an empty list if none is configured. `ranks`: see
    `train_datasets`."""
    specs = dataset_specs(cfg, "val")
    if not specs:
        return []
    build = partial(build_datasets, specs, dict(cfg.data.aliases), label_space, on_error=cfg.data.on_error)
    return once_per_machine(build, ranks)[0]


def build_mapper(cfg: DictConfig, targets: Mapping[str, Target], training: bool, labels: bool | None = None) -> Mapper:
    """What turns records into samples: training or test augmentation."""
    key = "train_augment" if training else "test_augment"
    return Mapper(
        targets,
        build_augmentations(cfg.data[key], f"data.{key}"),
        input_format=cfg.model.input_format,
        crowd=cfg.data.crowd,
        on_error=cfg.data.on_error,
        seed=cfg.seed,
        training=training,
        labels=labels,
    )


def build_views(cfg: DictConfig, tta: DictConfig) -> Views | None:
    """The views of test-time augmentation, None if it is off.

    Args:
        cfg: of the run, whose test augmentation is taken where `tta` names no sizes.
        tta: `scales`, `max_size` and `flip`, see `configs/evaluate.yaml`.
    """
    if tta.scales is None and not tta.flip:
        return None
    if tta.scales is None:
        sizes = [build_augmentations(cfg.data.test_augment, "data.test_augment")]
    else:
        sizes = [[T.ResizeShortestEdge(int(scale), int(tta.max_size))] for scale in tta.scales]
    return Views(sizes, bool(tta.flip), cfg.model.input_format)


def build_prepare(cfg: DictConfig) -> Callable[[np.ndarray], Sample]:
    """What turns an (H, W, 3) uint8 RGB image without labels into a sample, exactly as in evaluation. Threads may
    call it."""
    augment = T.AugmentationList(build_augmentations(cfg.data.test_augment, "data.test_augment"))

    def prepare(image: np.ndarray) -> Sample:
        given = T.AugInput(image)
        augment(given)
        pixels = given.image[:, :, ::-1] if cfg.model.input_format == "BGR" else given.image
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        return {"image": tensor, "height": image.shape[0], "width": image.shape[1]}

    return prepare


def build_planner(cfg: DictConfig, datasets: list[Dataset]) -> Plan:
    """Which images make which batch, over all training sets together."""
    sizes = [dataset.sizes for dataset in datasets]
    shares = batch_shares(cfg, datasets)
    plan = (cfg.solver.batch_size, cfg.data.window, cfg.seed)
    if shares is None:
        repeats = repeat_factors(datasets, cfg.data.repeat_thresh)
        return BatchPlanner(np.concatenate(sizes), *plan, repeats=repeats)
    factors = image_repeat_factors(datasets, cfg.data.repeat_thresh)
    samples = _samples(cfg, datasets)
    return MixedPlanner(sizes, list(shares.values()), *plan, sum(samples.values()), factors)


def batch_shares(cfg: DictConfig, datasets: list[Dataset]) -> dict[str, float] | None:
    """The share of each training set in every batch (`data.mixing`), None where it follows from the images alone."""
    mixing = cfg.data.get("mixing")
    if mixing is None or mixing.method is None:
        return None
    return mixing_shares(OmegaConf.to_container(mixing, resolve=True), _samples(cfg, datasets))


def epoch_length(cfg: DictConfig, datasets: list[Dataset]) -> float:
    """Training samples of an epoch: the number of images, or with repeats the mean, which need not be whole. That of a
    mixture is as long, although a data set may have more or less than its own epoch in it."""
    return build_planner(cfg, datasets).epoch_length


def _samples(cfg: DictConfig, datasets: list[Dataset]) -> dict[str, float]:
    """Samples of each data set's epoch, on average."""
    factors = image_repeat_factors(datasets, cfg.data.repeat_thresh)
    lengths = [dataset.repeat * own.sum() for dataset, own in zip(datasets, factors)]
    return {dataset.name: int(n) if n == int(n) else float(n) for dataset, n in zip(datasets, lengths)}


def train_loader(
    cfg: DictConfig, datasets: list[Dataset], targets: Mapping[str, Target], start_iteration: int, ranks: Ranks
) -> Loader:
    """This rank's endless batches. Raises ConfigError if they cannot be cut into `solver.accumulate` micro-batches."""
    check_world(cfg.solver.batch_size, ranks.world, cfg.solver.accumulate)
    return build_train_loader(
        ConcatDataset([dataset.records for dataset in datasets]),
        build_mapper(cfg, targets, training=True),
        build_planner(cfg, datasets),
        start_iteration,
        ranks.rank,
        ranks.world,
        cfg.data.workers,
    )


def evaluation_sets(
    cfg: DictConfig,
    datasets: list[Dataset],
    label_space: LabelSpace,
    ranks: Ranks,
    targets: Mapping[str, Target],
    *,
    losses: bool = False,
    views: Views | None = None,
) -> list[EvaluationSet]:
    """Loader and evaluators of every evaluation set: of the tasks that it declares, or all where it declares none.

    Args:
        targets: of all selected tasks; they check every label now, not at the first evaluation.
        losses: also a loader of samples with labels.
        views: of test-time augmentation: the first loader gives samples of these.

    Raises:
        DataError: a faulty label.
        ConfigError: a data set that declares none of the tasks.
    """

    def loader(dataset: Dataset, mapper: Mapper | ViewMapper) -> Loader:
        return build_eval_loader(dataset.records, mapper, ranks.rank, ranks.world, cfg.data.workers)

    label_table(datasets, targets)
    plain = build_mapper(cfg, {}, training=False) if views is None else ViewMapper(views, cfg.data.on_error)
    labelling = build_mapper(cfg, targets, training=False, labels=True)
    return [
        EvaluationSet(
            dataset.name,
            loader(dataset, plain),
            _declared_evaluators(cfg, label_space, dataset),
            loader(dataset, labelling) if losses else None,
        )
        for dataset in datasets
    ]


def _declared_evaluators(cfg: DictConfig, label_space: LabelSpace, dataset: Dataset) -> dict[str, Evaluator]:
    evaluators = build_evaluators(cfg, label_space, dataset.records)
    declared = dataset.records[0]["tasks"]
    kept = {name: evaluator for name, evaluator in evaluators.items() if declared is None or name in declared}
    if not kept:
        raise ConfigError(
            f"data.val: dataset {dataset.name!r} declares tasks: [{', '.join(declared)}], and the network has "
            f"{', '.join(evaluators)}: nothing is left to evaluate; remove it from data.val, or correct its `tasks`"
        )
    return kept
