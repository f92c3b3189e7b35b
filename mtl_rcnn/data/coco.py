"""COCO JSON files: several files of the same images merged by annotation id. `coco_file` reads and checks each one.

Nothing here knows any task. An annotation is `id`, `image_id`, `category_id`, perhaps `bbox`, and what tasks read.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl_rcnn.data.coco_file import Annotation, CocoFile, ImageId, are_numbers, read_file
from mtl_rcnn.data.faults import Fault, Repair, Sink, refuse
from mtl_rcnn.data.label_space import LOCAL_FIELDS, Category, Vocabularies, merge_vocabularies
from mtl_rcnn.errors import DataError

_BOX_TOLERANCE = 0.1
"""Pixels by which two files may differ in the box of one annotation (they round differently)."""
_RELATIVE_TOLERANCE = 1e-4
"""Relative difference below which two numbers are the same (COCO's own files differ in the last digits of `area`)."""


@dataclass
class CocoData:
    """What one or several files of the same images hold together.

    Attributes:
        files: where it comes from.
        images: image id -> entry of `images`, in the files' order.
        annotations: image id -> its annotations in the files' order (an empty list for images without any).
        categories: sorted by id.
        notes: what the user should know of the merge, one line each.
        extra: what else the first file holds, such as licences.
        vocabularies: name -> entries, see `label_space.Vocabularies`.
    """

    files: tuple[Path, ...]
    images: dict[ImageId, dict[str, Any]]
    annotations: dict[ImageId, list[Annotation]]
    categories: tuple[Category, ...]
    notes: tuple[str, ...]
    extra: dict[str, Any] = field(default_factory=dict)
    vocabularies: Vocabularies = field(default_factory=dict)


def read_coco(paths: Sequence[str | Path], report: Sink = refuse) -> CocoData:
    """Reads COCO files of the same images (COCO itself spreads the labels of its images over several files).

    Images, annotations and categories that several files share by id are united field by field.

    Args:
        paths: the files.
        report: what to do with faults; where it returns, what is at fault is left out.

    Raises:
        DataError: a file that is missing or malformed, or files that contradict each other.
    """
    files = tuple(Path(path) for path in paths)
    if not files:
        raise DataError("no annotation file given; expected one or several COCO JSON files")
    merge = _Merge(report)
    for file in files:
        merge.add(read_file(file, report))
    merge.leave_out_dropped()
    annotations: dict[ImageId, list[Annotation]] = {image_id: [] for image_id in merge.images}
    for annotation in merge.annotations.values():
        annotations[annotation["image_id"]].append(annotation)
    categories = tuple(merge.categories[key] for key in sorted(merge.categories))
    vocabularies = merge_vocabularies(merge.vocabularies, same_ids=True)
    return CocoData(files, merge.images, annotations, categories, merge.notes(), merge.extra, vocabularies)


# Several files


@dataclass
class _Merge:
    report: Sink
    images: dict[ImageId, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[ImageId, Annotation] = field(default_factory=dict)
    categories: dict[int, dict[str, Any]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    differing: Counter[str] = field(default_factory=Counter)
    partial: list[str] = field(default_factory=list)
    extra: dict[str, Any] = field(default_factory=dict)
    vocabularies: dict[str, Vocabularies] = field(default_factory=dict)
    dropped_images: set[ImageId] = field(default_factory=set)
    dropped_annotations: set[ImageId] = field(default_factory=set)

    def add(self, file: CocoFile) -> None:
        """Unites a file with what was read before; on fields that may differ, the earlier file wins."""
        if self.paths and self.images.keys() != file.images.keys():
            fewer = len(self.images.keys() - file.images.keys())
            more = len(file.images.keys() - self.images.keys())
            self.partial.append(f"{file.path.name} lacks {fewer} images of the files before it and adds {more}")
        schema = {key for category in file.categories.values() for key in category} - {*LOCAL_FIELDS}
        for own, other, kind, must_agree in (
            (self.images, file.images, "image", {"file_name", "height", "width"}),
            (self.categories, file.categories, "category", schema),
            (self.annotations, file.annotations, "annotation", {"image_id", "category_id", "bbox", "iscrowd"}),
        ):
            for number, entry in other.items():
                self._unite(own.setdefault(number, entry), entry, f"{kind} {number}", must_agree, file.path)
        self.extra = self.extra or file.extra
        self.vocabularies[str(file.path)] = file.vocabularies
        self.dropped_images |= file.dropped_images
        self.dropped_annotations |= file.dropped_annotations
        self.paths.append(file.path)

    def leave_out_dropped(self) -> None:
        """Takes what is at fault in one file out of all."""
        for number in self.dropped_images & self.images.keys():
            del self.images[number]
        for number, entry in list(self.annotations.items()):
            if number in self.dropped_annotations or entry["image_id"] in self.dropped_images:
                del self.annotations[number]

    def notes(self) -> tuple[str, ...]:
        """What the user should know."""
        differing = [
            f"{number} entries differ in {key} between the merged files; the first file that has the field is used"
            for key, number in sorted(self.differing.items())
        ]
        return (*self.partial, *differing)

    def _unite(self, own: dict, entry: Mapping, named: str, must_agree: set[str], path: Path) -> None:
        if own is entry:
            return
        for key, value in entry.items():
            tolerance = _BOX_TOLERANCE if key == "bbox" else 0.0
            if _same(own.setdefault(key, value), value, tolerance):
                continue
            if key in must_agree:
                self.report(self._contradiction(own, key, value, named, path))
                continue
            self.differing[f"{named.split()[0]} field {key!r}"] += 1

    def _contradiction(self, own: Mapping, key: str, value: Any, named: str, path: Path) -> Fault:
        message = (
            f"{path}: {named} has {key} {value}, but an earlier file ({', '.join(map(str, self.paths))}) says "
            f"{own[key]} for the same id; files merge only if they describe the same images with the same ids"
        )
        kind = named.split()[0]
        ids = {f"{kind}_id": own["id"]} if kind != "category" else {}
        if kind == "annotation":
            ids["image_id"] = own["image_id"]
        repair = Repair(f"keep the earlier file's {key}")
        return Fault("files contradict each other", message, str(path), field=key, repair=repair, **ids)


def _same(one: Any, other: Any, tolerance: float) -> bool:
    if one == other:
        return True
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b, tolerance) for a, b in zip(one, other))
    if are_numbers([one, other]):
        return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=tolerance)
    return False
