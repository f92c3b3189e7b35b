"""Data sets that label different things of the same images: one for each kind of label there is."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from detectron2.data import transforms as T
from tiny import available_tasks, tiny_config
from toy import Toy

from mtl_rcnn.data.catalog import Dataset, build_datasets
from mtl_rcnn.data.coverage import check_useful, label_table
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

SIZE = (48, 64)
"""Height and width of every image in the network: of one size, lest its company change how an image is padded."""


@dataclass(frozen=True)
class Kind:
    """A kind of data set.

    Attributes:
        tasks: that it labels.
        image: fields of the images' entries that it keeps.
        annotation: fields of the annotations that it keeps, besides the box; None: no annotations and no categories.
        vocabularies: that it keeps.
        file: of the toy data set.
    """

    tasks: tuple[str, ...]
    image: tuple[str, ...] = ()
    annotation: tuple[str, ...] | None = None
    vocabularies: tuple[str, ...] = ()
    file: str = "boxes"


ALL_KINDS = {
    "boxes": Kind(("detection",), annotation=()),
    "masks": Kind(("detection", "mask"), annotation=("segmentation",)),  # one square has none
    "points": Kind(("detection", "keypoint"), annotation=("keypoints", "num_keypoints"), file="points"),
    "distances": Kind(("depth",), ("depth_file_name", "depth_scale")),
    "classes": Kind(("semantic",), ("sem_seg_file_name",), vocabularies=("sem_seg_classes",)),
    "words": Kind(("image_label",), ("image_labels",), vocabularies=("image_labels",)),
}
KINDS = {name: kind for name, kind in ALL_KINDS.items() if {*kind.tasks} <= {*available_tasks()}}
"""Those whose tasks this copy of the project has."""
TASKS = tuple(dict.fromkeys(task for kind in KINDS.values() for task in kind.tasks))
SMALL = [
    *("model.backbone.norm=FrozenBN", "data.workers=0"),
    *(f"tasks.{task}.decoder.conv_dim=32" for task in ("depth", "semantic") if task in TASKS),
]
_IMAGE = ("id", "file_name", "height", "width")
_ANNOTATION = ("id", "image_id", "category_id", "bbox", "area", "iscrowd")


def specs(toy: Toy, kinds: Sequence[str] = tuple(KINDS)) -> list[dict[str, Any]]:
    """Writes a JSON of each kind; returns the data sets' entries in a configuration."""
    nodes = []
    for name in kinds:
        kind = KINDS[name]
        path = toy.root / f"kind_{name}.json"
        path.write_text(json.dumps(_content(json.loads(getattr(toy, kind.file).read_text()), kind)))
        nodes.append({"name": name, "images": str(toy.images), "annotations": str(path)})
    return nodes


def _content(content: Mapping[str, Any], kind: Kind) -> dict[str, Any]:
    fields = (*_ANNOTATION, *(kind.annotation or ()))
    objects = content["annotations"] if kind.annotation is not None else []
    return {
        "images": [{k: v for k, v in image.items() if k in (*_IMAGE, *kind.image)} for image in content["images"]],
        "annotations": [{k: v for k, v in entry.items() if k in fields} for entry in objects],
        "categories": content["categories"] if kind.annotation is not None else [],
        "vocabularies": {name: content["vocabularies"][name] for name in kind.vocabularies},
    }


@dataclass(frozen=True)
class Mixture:
    """A network of all tasks, and data sets of all kinds.

    Attributes:
        model: in float64 and training mode; norms do not depend on an image's company.
        samples: kind -> its images with their labels; position n in the stream is unique.
        datasets, mapper: they come from.
    """

    model: MultiTaskRCNN
    samples: dict[str, list[Sample]]
    datasets: list[Dataset]
    mapper: Mapper


def mixture(toy: Toy) -> Mixture:
    """Of the toy data set, in all kinds."""
    cfg = tiny_config(TASKS, *SMALL)
    datasets, space = build_datasets([DatasetSpec.from_config(node) for node in specs(toy)], {})
    targets = build_targets(cfg, space)
    check_useful(label_table(datasets, targets), datasets)
    mapper = Mapper(targets, [T.Resize(SIZE)])
    numbers = iter(range(1000))
    samples = {dataset.name: [mapper(record, next(numbers)) for record in dataset.records] for dataset in datasets}
    return Mixture(build_model(cfg, space).double().train(), samples, datasets, mapper)
