"""Contact sheets of the images that a task got most wrong, ground truth beside prediction."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from mtl_rcnn.data.mapper import Mapper, read_image
from mtl_rcnn.data.target import Prediction, Record, Target
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import build_mapper, val_datasets
from mtl_rcnn.engine.gallery import as_prediction
from mtl_rcnn.engine.inspection import Inspection
from mtl_rcnn.evaluation.analysis import Analysis, ImageErrors, analysis_path
from mtl_rcnn.evaluation.inference import evaluation_mode
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.visualize.gallery import contact_sheet, draw_prediction, drawing_order, side_by_side, write_image


def draw_worst(inspection: Inspection, number: int) -> list[Path]:
    """Draws `<dataset>_<task>_worst.png` of every analysis that the inspection of a network kept.

    Each picture holds up to `number` images that are not flawless, the worst first, with the detections that the
    errors count (`Analysis.thresholds`). Returns the pictures' paths.
    """
    cfg, label_space, network = inspection.cfg, inspection.label_space, inspection.network
    assert network is not None, "only predictions of a network can be drawn"
    targets = build_targets(cfg, label_space)
    truth = Mapper(targets, [], cfg.model.input_format, training=False, labels=True)
    prepare = build_mapper(cfg, {}, training=False)
    datasets = {dataset.name: dataset.records for dataset in val_datasets(cfg, label_space)}
    places = {name: {record["image_id"]: n for n, record in enumerate(own)} for name, own in datasets.items()}
    paths = []
    for (dataset, task), analysis in inspection.analyses.items():
        shown = {name: target for name, target in targets.items() if name in (next(iter(targets)), task)}
        tiles, titles = [], []
        for image in [image for image in analysis.images if image.f1 < 1][:number]:
            record = datasets[dataset][places[dataset][image.image_id]]
            found = _predict(network, prepare, record)
            confident = _confident(found, analysis, network, label_space.index())
            labels = as_prediction(truth(record, 0), targets)
            tiles.append(_pair(record, labels, confident, shown, label_space.classes))
            titles.append(_title(record, image))
        if tiles:
            path = analysis_path(inspection.folder, dataset, task, "worst.png")
            paths.append(write_image(path, contact_sheet(tiles, columns=2, titles=titles)))
    return paths


def _predict(network: MultiTaskRCNN, prepare: Mapper, record: Record) -> Prediction:
    with evaluation_mode(network):
        (prediction,) = network.predict([prepare(record, 0)])
    return {name: value.cpu() for name, value in prediction.items()}


def _confident(
    prediction: Prediction, analysis: Analysis, network: MultiTaskRCNN, index_of: Mapping[str, int]
) -> Prediction:
    """The detections with at least their class's threshold."""
    least = torch.zeros(len(index_of), dtype=torch.float64)
    for name, threshold in analysis.thresholds.items():
        least[index_of[name]] = threshold
    keep = prediction["scores"].double() >= least[prediction["classes"]]
    rows = {output.name for task in network.tasks() for output in task.outputs() if output.shape.startswith("(N")}
    return {name: value[keep] if name in rows else value for name, value in prediction.items()}


def _pair(
    record: Record,
    labels: Prediction,
    found: Prediction,
    targets: Mapping[str, Target],
    classes: tuple[str, ...],
) -> np.ndarray:
    image = read_image(record)
    return side_by_side(*(draw_prediction(image, shown, drawing_order(targets), classes) for shown in (labels, found)))


def _title(record: Record, image: ImageErrors) -> str:
    return (
        f"{record['dataset']} {record['image_id']}: F1 {100 * image.f1:.0f}, "
        f"{image.found} found, {image.missed} missed, {image.false} false"
    )
