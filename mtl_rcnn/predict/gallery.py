"""A picture to judge a run by: predictions beside the ground truth."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mtl_rcnn.data.mapper import Mapper, read_image
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import val_datasets
from mtl_rcnn.engine.gallery import as_prediction
from mtl_rcnn.predict.predictor import Predictor
from mtl_rcnn.visualize.gallery import contact_sheet, draw_prediction, drawing_order, side_by_side, write_image


def write_gallery(path: Path, predictor: Predictor, number: int = 12, threshold: float = 0.5) -> None:
    """One picture: images of the first evaluation set, ground truth beside prediction.

    Args:
        path: of the PNG.
        number: images, spread over the set.
        threshold: least score that is drawn.
    """
    cfg, label_space = predictor.cfg, predictor.label_space
    targets = build_targets(cfg, label_space)
    truth_of = Mapper(targets, [], cfg.model.input_format, training=False, labels=True)
    pairs, titles = [], []
    for record in _some_of(val_datasets(cfg, label_space)[0].records, number):
        image = read_image(record)
        truth = as_prediction(truth_of(record, 0), targets)
        found = predictor.confident(predictor.one(image), threshold)
        drawn = [draw_prediction(image, shown, drawing_order(targets), label_space.classes) for shown in (truth, found)]
        pairs.append(side_by_side(*drawn))
        titles.append(f"{record['dataset']} {record['image_id']}")
    write_image(path, contact_sheet(pairs, columns=2, titles=titles))


def _some_of(items: Sequence[Any], number: int) -> list[Any]:
    """`number` items spread evenly over a sequence, or all of a shorter one."""
    if len(items) <= number:
        return list(items)
    return [items[index * len(items) // number] for index in range(number)]
