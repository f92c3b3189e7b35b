"""What a data set lacks, task by task, and putting it there; what exists is never touched."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import numpy as np
import torch

from mtl_rcnn.data.catalog import Dataset
from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import GivenBoxes, InstanceTarget, Prediction, Record, Target, WrittenLabel
from mtl_rcnn.predict.label_files import LabelFiles

_SAME_OBJECT = 0.5
"""IoU from which on a detection is an object that is annotated already."""
_LEAST_SIDE = 0.01
"""Pixels; a smaller box has nothing in it to describe, and may vanish when it is scaled."""

Objects = list[dict[str, Any]]
"""Annotations of a record with boxes in the image."""


@dataclass
class Tally:
    """What became of a task's labels, in images, or in instances where it labels these."""

    added: int = 0
    there: int = 0
    unsure: int = 0


@dataclass
class Job:
    """A data set that is being labelled.

    Attributes:
        dataset: as it was read.
        data: its content, to which labels are added.
        targets: task -> its data side, of the tasks to label, in slot order.
        detector: the detector's name if it is one of them.
        thresholds: task -> least confidence.
        origin: what stands in every mark: {"pseudo": {task: {**origin, "threshold": ...}}}.
        category_ids: class index -> the data set's own id, of the classes whose objects are added.
        tallies: by task.
    """

    dataset: Dataset
    data: CocoData
    targets: Mapping[str, Target]
    detector: str | None
    thresholds: Mapping[str, float]
    origin: Mapping[str, Any]
    category_ids: dict[int, int] = field(default_factory=dict)
    tallies: dict[str, Tally] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.tallies = {name: Tally() for name in self.targets}
        ids = [entry["id"] for entries in self.data.annotations.values() for entry in entries]
        self._ids = count(1 + max((number for number in ids if isinstance(number, int)), default=0))

    def lacks_objects(self, record: Record) -> bool:
        """Whether objects are to be found in this image."""
        return self.detector is not None and not self.targets[self.detector].check(record).image

    def add(self, record: Record, prediction: Prediction, objects: Objects | None, files: LabelFiles) -> None:
        """Adds one image's labels of all tasks.

        Args:
            record: the image.
            prediction: what the network says of it.
            objects: the annotations that the prediction's rows describe; None: the rows are detections.
            files: that take maps of labels.
        """
        found = [] if objects is not None else self._new_objects(record, prediction)
        for name, target in self.targets.items():
            if name == self.detector:
                self.tallies[name].there += len(objects or ())
                continue
            label = target.as_label(record, prediction, self.thresholds[name])
            if not isinstance(target, InstanceTarget):
                self._label_image(name, record, label, files)
            else:
                self._label_rows(name, found if objects is None else self._lacking(name, record, objects), label)
        self.data.annotations[record["image_id"]] += [row for row in found if row is not None]

    def _new_objects(self, record: Record, prediction: Prediction) -> list[dict[str, Any] | None]:
        """An annotation per detection that is sure enough and not annotated yet, else None."""
        name, tally = self.detector, self.tallies[self.detector]
        rows: list[dict[str, Any] | None] = []
        for fields in self.targets[name].as_label(record, prediction, self.thresholds[name]).annotations:
            sure = fields is not None and fields["category_id"] in self.category_ids
            there = sure and any(_same_object(fields, entry) for entry in record["annotations"])
            tally.unsure += not sure
            tally.there += there
            tally.added += sure and not there
            rows.append(self._annotation(record, fields) if sure and not there else None)
        self.data.images[record["image_id"]].setdefault("pseudo", {})[name] = self._mark(name)
        return rows

    def _annotation(self, record: Record, fields: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "id": next(self._ids),
            "image_id": record["image_id"],
            "iscrowd": 0,
            **fields,
            "category_id": self.category_ids[fields["category_id"]],
            "pseudo": {self.detector: self._mark(self.detector)},
        }

    def _lacking(self, name: str, record: Record, objects: Objects) -> list[dict[str, Any] | None]:
        """The data set's own entries of the objects without a label of the task; None for the others."""
        target = self.targets[name]
        label = target.load(record, objects, Geometry.identity(record["height"], record["width"]))
        has = [False] * len(objects) if label is None else label[f"gt_has_{name}"].tolist()
        self.tallies[name].there += sum(has)
        own = {entry["id"]: entry for entry in self.data.annotations[record["image_id"]]}
        return [None if labelled else own[entry["id"]] for entry, labelled in zip(objects, has)]

    def _label_rows(self, name: str, rows: Sequence[dict[str, Any] | None], label: WrittenLabel | None) -> None:
        """Puts a task's fields into annotations, but for those that are filled."""
        given = [None] * len(rows) if label is None else label.annotations
        for row, fields in zip(rows, given, strict=True):
            if row is None:
                continue
            fields = fields or {}
            new = {key: value for key, value in fields.items() if row.get(key) is None}
            sure = any(value is not None for value in new.values())
            there = bool(fields) and not new  # although the data set declares it not to be
            self.tallies[name].added += sure
            self.tallies[name].there += there
            self.tallies[name].unsure += not sure and not there
            row.update(new)
            if sure:
                row["pseudo"] = {**row.get("pseudo", {}), name: self._mark(name)}

    def _label_image(self, name: str, record: Record, label: WrittenLabel | None, files: LabelFiles) -> None:
        tally, entry = self.tallies[name], self.data.images[record["image_id"]]
        # Of a map its file counts: the scale of all maps of a data set may stand on images that have none.
        fields = {} if label is None else label.maps or label.image
        if self.targets[name].check(record).image or any(entry.get(key) is not None for key in fields):
            tally.there += 1
        elif not fields:
            tally.unsure += 1
        else:
            tally.added += 1
            entry.update(label.image)
            entry.update({key: files.add(entry, key, values) for key, values in label.maps.items()})
            entry["pseudo"] = {**entry.get("pseudo", {}), name: self._mark(name)}

    def _mark(self, name: str) -> dict[str, Any]:
        return {**self.origin, "threshold": self.thresholds[name]}


def objects_of(record: Record) -> tuple[Objects, GivenBoxes]:
    """The objects of an image that have a box in it, and these boxes; crowds are none."""
    size = [record["width"], record["height"]] * 2
    objects, boxes = [], []
    for entry in record["annotations"]:
        box = np.clip(_corners(entry["bbox"]), 0, size) if "bbox" in entry and not entry["iscrowd"] else np.zeros(4)
        if (box[2:] - box[:2] > _LEAST_SIDE).all():
            objects.append(entry)
            boxes.append(box)
    classes = torch.tensor([entry["category_id"] for entry in objects], dtype=torch.int64)
    return objects, GivenBoxes(torch.tensor(np.array(boxes).reshape(-1, 4), dtype=torch.float32), classes)


def add_categories(data: CocoData, space: LabelSpace, names: Mapping[str, int]) -> dict[int, int]:
    """Gives a data set the network's classes that it lacks; returns class index -> its category id.

    Args:
        data: of the data set.
        space: of the network.
        names: class name -> id of the data set's own category of it.
    """
    free = count(1 + max((category["id"] for category in data.categories), default=0))
    new = {c["name"]: {**c, "id": next(free)} for c in space.categories if c["name"] not in names}
    data.categories = (*data.categories, *new.values())
    return {index: names[name] if name in names else new[name]["id"] for name, index in space.index().items()}


def drop_images(data: CocoData, image_ids: Iterable[int | str]) -> None:
    """Takes images and their annotations out."""
    for image_id in image_ids:
        del data.images[image_id], data.annotations[image_id]


def _same_object(fields: Mapping[str, Any], entry: Mapping[str, Any]) -> bool:
    if entry["category_id"] != fields["category_id"] or "bbox" not in entry:
        return False
    one, other = _corners(fields["bbox"]), _corners(entry["bbox"])
    shared = np.clip(np.minimum(one[2:], other[2:]) - np.maximum(one[:2], other[:2]), 0, None).prod()
    either = (one[2:] - one[:2]).prod() + (other[2:] - other[:2]).prod() - shared
    return bool(shared >= _SAME_OBJECT * either)


def _corners(box: Sequence[float]) -> np.ndarray:
    x, y, width, height = box
    return np.array([x, y, x + width, y + height], dtype=np.float64)
