"""Pictures to judge a run by: what the loader feeds, and predictions beside the ground truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from omegaconf import DictConfig

from mtl_rcnn.data.mapper import Mapper, read_image
from mtl_rcnn.data.target import Prediction, Sample, Target
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import build_mapper, build_planner, train_datasets, val_datasets
from mtl_rcnn.engine.predict import Predictor, drawing_order, image_of, some_of
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.visualize.gallery import contact_sheet, draw_prediction, side_by_side, write_image


def write_gallery(path: Path, predictor: Predictor, number: int = 12, threshold: float = 0.5) -> None:
    """One picture: images of the first evaluation set, ground truth beside prediction.

    Args:
        path: of the PNG.
        number: images, spread over the set.
        threshold: least score that is drawn.
    """
    titles, pairs = zip(*gallery_tiles(predictor, number, threshold))
    write_image(path, contact_sheet(pairs, columns=2, titles=titles))


def gallery_tiles(predictor: Predictor, number: int, threshold: float = 0.5) -> list[tuple[str, np.ndarray]]:
    """Titles and (H, W, 3) RGB drawings, ground truth beside prediction, of images spread over the first evaluation
    set (see `write_gallery`). ConfigError if there is no such set."""
    cfg, label_space = predictor.cfg, predictor.label_space
    datasets = val_datasets(cfg, label_space)
    if not datasets:
        raise ConfigError("the run has no evaluation set to show predictions on")
    targets = build_targets(cfg, label_space)
    truth_of = Mapper(targets, [], cfg.model.input_format, training=False, labels=True)
    tiles = []
    for record in some_of(datasets[0].records, number):
        image = read_image(record)
        truth = as_prediction(truth_of(record, 0), targets)
        found = predictor.confident(predictor.predict(image), threshold)
        drawn = [draw_prediction(image, shown, drawing_order(targets), label_space.classes) for shown in (truth, found)]
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
        image_of(sample, input_format), as_prediction(sample, labelled), drawing_order(labelled), classes
    )


def as_prediction(sample: Sample, targets: dict[str, Target]) -> Prediction:
    """The labels of all given tasks in the form of one prediction."""
    merged: Prediction = {}
    for target in targets.values():
        merged |= target.as_prediction(sample)
    return merged
