"""Records of one dataset: chosen, mapped to class indices, filtered; what is left out is counted by reason."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.dataset_spec import DatasetSpec, is_file_field
from mtl_rcnn.data.target import Record
from mtl_rcnn.errors import ConfigError, DataError

_BOOKKEEPING = ("id", "license", "coco_url", "flickr_url", "date_captured")
"""Fields of COCO's image entries that no task reads: left out of the records, which are many."""


@dataclass
class Report:
    """What became of a dataset's images.

    Attributes:
        total, kept: number of images.
        removed: reason -> number of images removed for it.
        notes: anything else worth a line.
        missing: records without an image file, left out.
    """

    total: int = 0
    kept: int = 0
    removed: Counter[str] = field(default_factory=Counter)
    notes: list[str] = field(default_factory=list)
    missing: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.removed:
            return f"kept all {self.total} images"
        reasons = ", ".join(f"{reason} ({number})" for reason, number in self.removed.items())
        return f"kept {self.kept} of {self.total} images; removed {sum(self.removed.values())}: {reasons}"


@dataclass(frozen=True)
class ClassMap:
    """How a dataset's categories and the network's classes correspond.

    Attributes:
        class_index: the dataset's category id -> class index.
        category_ids: class index -> the category id to report the class under.
    """

    class_index: Mapping[int, int]
    category_ids: Mapping[int, int]


EntryMaps = Mapping[str, Mapping[int | str, int]]
"""Vocabulary -> the dataset's own id of each of its entries -> the network's index of it."""


def make_records(
    spec: DatasetSpec,
    data: CocoData,
    classes: ClassMap,
    entries: EntryMaps,
    min_instances: int,
    on_error: str,
    report: Report,
) -> list[Record]:
    """The records of a dataset; fills in `report`.

    Args:
        spec: which images to choose and what they label.
        data: the content of the files.
        classes: from the files' categories to class indices; annotations of other categories are left out.
        entries: of the dataset's vocabularies.
        min_instances: images with fewer instances (crowds not counted) are removed.
        on_error: "raise" or "skip", for image files that are missing.

    Raises:
        ConfigError: `image_ids` that do not exist.
        DataError: image files that are missing, or no image is left.
    """
    report.total = len(data.images)
    if not os.path.isdir(spec.images):
        raise DataError(f"dataset {spec.name!r}: no image folder {spec.images}; correct its 'images' or data.root")
    chosen = _choose(spec, data, report)
    records = [_record(spec, image, data.annotations[image["id"]], classes, entries) for image in chosen]
    records = _remove_poor(records, min_instances, report)
    records = _remove_missing(spec, records, on_error, report)
    _count(report, "beyond limit", len(records) - len(records[: spec.limit]))
    records = records[: spec.limit]
    _note_left_out(records, data, report)
    _note_empty_boxes(records, report)
    report.kept = len(records)
    if not records:
        raise DataError(f"dataset {spec.name!r}: no image is left ({report})")
    return records


def some(names: Iterable[Any], number: int = 8) -> str:
    """The first names, and how many there are if not all are shown."""
    names = [str(name) for name in names]
    return ", ".join(names[:number]) + (f" ... ({len(names)} in all)" if len(names) > number else "")


def _choose(spec: DatasetSpec, data: CocoData, report: Report) -> list[dict[str, Any]]:
    images = list(data.images.values())
    if spec.image_ids is not None:
        unknown = [number for number in spec.image_ids if number not in data.images]
        if unknown:
            raise ConfigError(
                f"dataset {spec.name!r}: image_ids names {unknown[0]!r}, which is no image of {data.files[0]} "
                f"({len(unknown)} of {len(spec.image_ids)} are unknown)"
            )
        wanted = {*spec.image_ids}
        images = [image for image in images if image["id"] in wanted]
        _count(report, "not in image_ids", len(data.images) - len(images))
    return images


def _record(
    spec: DatasetSpec,
    image: Mapping[str, Any],
    annotations: Sequence[Mapping[str, Any]],
    classes: ClassMap,
    entries: EntryMaps,
) -> Record:
    index = classes.class_index
    kept = {key: value for key, value in image.items() if key not in _BOOKKEEPING}
    files = {
        key: os.path.normpath(os.path.join(spec.images, value))
        for key, value in kept.items()
        if is_file_field(key) and isinstance(value, str)
    }
    return {
        **kept,
        **files,
        "image_id": image["id"],
        "dataset": spec.name,
        "annotations": [
            {**entry, "category_id": index[entry["category_id"]]}
            for entry in annotations
            if entry["category_id"] in index
        ],
        "tasks": spec.tasks,
        "classes": tuple(classes.category_ids),
        "category_ids": tuple(classes.category_ids.values()),
        "vocabularies": entries,
    }


def _remove_poor(records: list[Record], min_instances: int, report: Report) -> list[Record]:
    def instances(record: Record) -> int:
        return sum(not entry["iscrowd"] for entry in record["annotations"])

    kept = [record for record in records if instances(record) >= min_instances]
    reason = "no instances" if min_instances == 1 else f"fewer than {min_instances} instances"
    _count(report, reason, len(records) - len(kept))
    return kept


def _remove_missing(spec: DatasetSpec, records: list[Record], on_error: str, report: Report) -> list[Record]:
    # One listing per folder: asking for each of 100,000 files on a network file system takes minutes.
    folders = {os.path.dirname(record["file_name"]) for record in records}
    files = {os.path.join(folder, name) for folder in folders if os.path.isdir(folder) for name in os.listdir(folder)}
    missing = [record for record in records if record["file_name"] not in files]
    if missing and on_error != "skip":
        raise DataError(
            f"dataset {spec.name!r}: {len(missing)} of {len(records)} image files are missing, the first is "
            f"{missing[0]['file_name']} (image id {missing[0]['image_id']}); correct the dataset's 'images' or "
            "data.root, or leave them out with data.on_error=skip"
        )
    report.missing = missing
    _count(report, "image file missing", len(missing))
    if missing:
        report.notes.append(f"image files missing: {some((record['file_name'] for record in missing), 20)}")
    return [record for record in records if record["file_name"] in files]


def _count(report: Report, reason: str, number: int) -> None:
    if number:
        report.removed[reason] = number


def _note_left_out(records: Sequence[Record], data: CocoData, report: Report) -> None:
    number = sum(len(data.annotations[record["image_id"]]) - len(record["annotations"]) for record in records)
    if number:
        report.notes.append(f"{number} annotations of classes that are not selected are left out")


def _note_empty_boxes(records: Sequence[Record], report: Report) -> None:
    # COCO's own training set has such annotations: no reason to stop, but to be said.
    empty = [
        entry["id"]
        for record in records
        for entry in record["annotations"]
        if "bbox" in entry and min(entry["bbox"][2:]) == 0
    ]
    if empty:
        report.notes.append(
            f"{len(empty)} annotations have a box without width or height and train nothing: ids {some(empty)}"
        )
