"""Pictures of what the loader feeds, and of what a network makes of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig
from torch.utils.data import ConcatDataset

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.mapper import Mapper, read_image
from mtl_rcnn.data.target import Prediction, Sample, Target
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import build_mapper, build_planner, build_prepare, train_datasets, val_datasets
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.inference import evaluation_mode
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.visualize.gallery import (
    contact_sheet,
    draw_prediction,
    drawing_order,
    is_wide,
    side_by_side,
    write_image,
)


@dataclass(frozen=True)
class Showcase:
    """A network of which predictions are to be shown.

    Attributes:
        predict: (H, W, 3) uint8 RGB -> what is to be drawn, in the image's pixels, on the CPU.
        cfg, label_space: of the network.
    """

    predict: Callable[[np.ndarray], Prediction]
    cfg: DictConfig
    label_space: LabelSpace


def network_showcase(
    model: MultiTaskRCNN, cfg: DictConfig, label_space: LabelSpace, threshold: float = 0.5
) -> Showcase:
    """Detections of at least this score by a network, also by one in training; images are prepared as in evaluation."""
    prepare = build_prepare(cfg)
    rows = {output.name for task in model.tasks() for output in task.outputs() if output.shape.startswith("(N")}

    def predict(image: np.ndarray) -> Prediction:
        with evaluation_mode(model):
            (found,) = model([prepare(image)])
        found = {name: value.cpu() for name, value in found.items()}
        if "scores" not in found:
            return found
        keep = found["scores"] >= threshold
        return {name: value[keep] if name in rows else value for name, value in found.items()}

    return Showcase(predict, cfg, label_space)


def gallery_tiles(show: Showcase, number: int) -> list[tuple[str, np.ndarray]]:
    """Titles and (H, W, 3) RGB drawings, ground truth beside prediction, of images spread over the first evaluation
    set. ConfigError if there is no such set."""
    datasets = val_datasets(show.cfg, show.label_space)
    if not datasets:
        raise ConfigError("the run has no evaluation set to show predictions on")
    targets = build_targets(show.cfg, show.label_space)
    truth_of = Mapper(targets, [], show.cfg.model.input_format, training=False, labels=True)
    order, classes = drawing_order(targets), show.label_space.classes
    tiles = []
    for record in _some_of(datasets[0].records, number):
        image = read_image(record)
        truth = as_prediction(truth_of(record, 0), targets)
        drawn = [draw_prediction(image, shown, order, classes) for shown in (truth, show.predict(image))]
        tiles.append((f"{record['dataset']} {record['image_id']}", side_by_side(*drawn)))
    return tiles


def visualize_data(cfg: DictConfig) -> Path:
    """Draws what the loader feeds (`configs/visualize_data.yaml`): images as the network gets them, each task's
    labels on top."""
    datasets, label_space = train_datasets(cfg)
    training = cfg.split == "train"
    chosen = datasets if training else val_datasets(cfg, label_space)
    targets = build_targets(cfg, label_space)
    mapper = build_mapper(cfg, targets, training=training, labels=True)
    records = ConcatDataset([dataset.records for dataset in chosen])
    slots = [(index, index) for index in range(cfg.number)]
    if training:
        planner = build_planner(cfg, chosen)
        batches = -(-cfg.number // cfg.solver.batch_size)
        slots = [slot for index in range(batches) for slot in planner.batch(index)]
    drawings, titles = [], []
    for sample_index, record_index in slots[: min(cfg.number, len(slots) if training else len(records))]:
        sample = mapper(records[record_index], sample_index)
        drawings.append(draw_sample(sample, targets, label_space.classes, cfg.model.input_format))
        labelled = ", ".join(name for name, has in sample["labelled"].items() if has) or "nothing"
        titles.append(f"{sample['dataset']} {sample['image_id']}: {labelled}")
    columns = 2 if any(is_wide(drawn) for drawn in drawings) else 4
    write_image(Path(cfg.picture), contact_sheet(drawings, columns=columns, titles=titles))
    print(f"wrote {cfg.picture}: {len(drawings)} samples, labelled tasks in the titles")
    return Path(cfg.picture)


def draw_sample(sample: Sample, targets: dict[str, Target], classes: tuple[str, ...], input_format: str) -> np.ndarray:
    """(H, W, 3) RGB: a sample's image with the labels it carries."""
    labelled = {name: target for name, target in targets.items() if sample["labelled"][name]}
    return draw_prediction(
        _image_of(sample, input_format), as_prediction(sample, labelled), drawing_order(labelled), classes
    )


def as_prediction(sample: Sample, targets: dict[str, Target]) -> Prediction:
    """The labels of all given tasks in the form of one prediction."""
    merged: Prediction = {}
    for target in targets.values():
        merged |= target.as_prediction(sample)
    return merged


def _image_of(sample: Sample, input_format: str) -> np.ndarray:
    """A sample's image as (H, W, 3) uint8 RGB."""
    image = sample["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image[:, :, ::-1] if input_format == "BGR" else image)


def _some_of(items: Sequence[Any], number: int) -> list[Any]:
    """`number` items spread evenly over a sequence, or all of a shorter one."""
    if len(items) <= number:
        return list(items)
    return [items[index * len(items) // number] for index in range(number)]
