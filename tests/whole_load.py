"""What training, evaluation and the check do with a dataset's labels and images, in one call."""

from __future__ import annotations

from functools import cache
from typing import Any

from omegaconf import DictConfig
from tiny import tiny_config
from toy import Toy

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.coverage import check_useful, label_table
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.inspection import label_faults
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.evaluation.coco_truth import coco_ground_truth

ALL = ("detection", "mask", "keypoint", "attribute", "semantic", "depth", "text")


@cache
def configuration() -> DictConfig:
    """Of a tiny network with these tasks."""
    return tiny_config(ALL)


def load_everything(toy: Toy, on_error: str = "raise", **spec: Any) -> list[Sample]:
    """Reads the files, checks all labels, loads every image with its labels, and makes ground truth of them. Returns
    the samples."""
    specs = [DatasetSpec.from_config(toy.node(**spec), str(toy.root))]
    datasets, label_space = build_datasets(specs, {}, on_error=on_error)
    targets = build_targets(configuration(), label_space)
    check_useful(label_table(datasets, targets), datasets)
    list(label_faults(datasets[0].records, targets))
    mapper = Mapper(targets, [])
    samples = [mapper(record, index) for index, record in enumerate(datasets[0].records)]
    for sample in samples:
        for target in targets.values():
            target.as_prediction(sample)
    for kind in ("bbox", "segm"):
        coco_ground_truth(datasets[0].records, label_space, kind)
    return samples
