"""Pictures of what the loader feeds."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mtl_rcnn.data.target import Prediction, Sample, Target
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import build_mapper, build_planner, train_datasets, val_datasets
from mtl_rcnn.visualize.gallery import contact_sheet, draw_prediction, drawing_order, write_image


def visualize_data(cfg: DictConfig) -> Path:
    """Draws what the loader feeds (`configs/visualize_data.yaml`): images as the network gets them, each task's
    labels on top."""
    datasets, label_space = train_datasets(cfg)
    training = cfg.split == "train"
    chosen = datasets if training else val_datasets(cfg, label_space)
    targets = build_targets(cfg, label_space)
    mapper = build_mapper(cfg, targets, training=training, labels=True)
    records = [record for dataset in chosen for record in dataset.records]
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
    write_image(Path(cfg.picture), contact_sheet(drawings, columns=4, titles=titles))
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
