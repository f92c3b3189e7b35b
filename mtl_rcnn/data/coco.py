"""COCO JSON files: read, checked, and several files of the same images merged by annotation id.

Nothing here knows any task. An annotation is `id`, `image_id`, `category_id`, perhaps `bbox`, and what tasks read.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl_rcnn.data.label_space import LOCAL_FIELDS, Category
from mtl_rcnn.errors import DataError

Annotation = dict[str, Any]
ImageId = int | str

_SECTIONS = ("images", "annotations", "categories")
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
    """

    files: tuple[Path, ...]
    images: dict[ImageId, dict[str, Any]]
    annotations: dict[ImageId, list[Annotation]]
    categories: tuple[Category, ...]
    notes: tuple[str, ...]


def read_coco(paths: Sequence[str | Path]) -> CocoData:
    """Reads COCO files of the same images (COCO itself spreads the labels of its images over several files).

    Images, annotations and categories that several files share by id are united field by field.

    Raises:
        DataError: a file that is missing or malformed, or files that contradict each other.
    """
    files = tuple(Path(path) for path in paths)
    if not files:
        raise DataError("no annotation file given; expected one or several COCO JSON files")
    merge = _Merge()
    for file in files:
        merge.add(_read_file(file))
    annotations: dict[ImageId, list[Annotation]] = {image_id: [] for image_id in merge.images}
    for annotation in merge.annotations.values():
        annotations[annotation["image_id"]].append(annotation)
    categories = tuple(merge.categories[key] for key in sorted(merge.categories))
    return CocoData(files, merge.images, annotations, categories, merge.notes())


# One file


@dataclass
class _File:
    path: Path
    images: dict[ImageId, dict[str, Any]]
    annotations: dict[ImageId, Annotation]
    categories: dict[int, dict[str, Any]]


def _read_file(path: Path) -> _File:
    content = _parse(path)
    missing = [section for section in _SECTIONS if not isinstance(content.get(section), list)]
    if missing:
        raise DataError(
            f"{path}: no list {missing[0]!r} at the top level (found: {', '.join(map(repr, content)) or 'nothing'}); "
            "expected a COCO JSON with 'images', 'annotations' and 'categories'"
        )
    images = _by_id(path, content["images"], "image", ("file_name", "height", "width"))
    categories = _by_id(path, content["categories"], "category", ("name",))
    annotations = _by_id(path, content["annotations"], "annotation", ("image_id", "category_id"))
    for number in categories:
        if not isinstance(number, int):
            raise DataError(f"{path}: category id {number!r} is not an integer; COCO category ids are integers")
    for image in images.values():
        _check_image(path, image)
    known_ids = _list_ids(categories)
    for annotation in annotations.values():
        _check_annotation(path, annotation, images, categories, known_ids)
    return _File(path, images, annotations, categories)


def _parse(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"{path}: no such annotation file; correct the dataset's 'annotations' or data.root") from None
    except OSError as error:
        raise DataError(f"{path}: the annotation file cannot be read ({error.strerror})") from error
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); the file may be truncated"
        ) from error
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not JSON (byte {error.start} is not UTF-8 text)") from error
    if not isinstance(content, dict):
        raise DataError(
            f"{path}: a {type(content).__name__} at the top level; expected a COCO JSON object with 'images'"
        )
    return content


def _by_id(path: Path, entries: list[Any], kind: str, required: Sequence[str]) -> dict[Any, dict[str, Any]]:
    result: dict[Any, dict[str, Any]] = {}
    for position, entry in enumerate(entries):
        for key in ("id", *required):
            if not isinstance(entry, dict) or key not in entry:
                named = (
                    f"{kind} {entry['id']}"
                    if isinstance(entry, dict) and "id" in entry
                    else f"{kind} number {position}"
                )
                raise DataError(f"{path}: {named} has no {key!r}; every COCO {kind} needs one")
        number = entry["id"]
        if isinstance(number, bool) or not isinstance(number, int | str):
            raise DataError(f"{path}: {kind} number {position} has id {number!r}; expected an integer or a string")
        if number in result:
            raise DataError(f"{path}: {kind} id {number} occurs twice; ids must differ within a file")
        result[number] = entry
    return result


def _check_image(path: Path, image: Mapping[str, Any]) -> None:
    for key in ("height", "width"):
        if isinstance(image[key], bool) or not isinstance(image[key], int) or image[key] <= 0:
            raise DataError(
                f"{path}: image {image['id']}: {key} is {image[key]!r}; expected a positive number of pixels"
            )
    if not isinstance(image["file_name"], str) or not image["file_name"]:
        raise DataError(
            f"{path}: image {image['id']}: file_name is {image['file_name']!r}; expected the image file's name"
        )


def _check_annotation(path: Path, annotation: Annotation, images: Mapping, categories: Mapping, known_ids: str) -> None:
    where = f"{path}: image {annotation['image_id']}, annotation {annotation['id']}"
    if annotation["image_id"] not in images:
        raise DataError(f"{where}: image_id {annotation['image_id']} is not among the file's {len(images)} images")
    if annotation["category_id"] not in categories:
        raise DataError(
            f"{where}: unknown category_id {annotation['category_id']}; the file's categories have ids {known_ids}"
        )
    if annotation.setdefault("iscrowd", 0) not in (0, 1):
        raise DataError(f"{where}: iscrowd is {annotation['iscrowd']!r}; expected 0 or 1")
    if "bbox" in annotation:
        _check_box(where, annotation["bbox"])


def _check_box(where: str, box: Any) -> None:
    numbers = isinstance(box, list) and all(isinstance(v, int | float) and math.isfinite(v) for v in box)
    if not numbers or len(box) != 4:
        raise DataError(f"{where}: bbox is {box!r}; expected 4 finite numbers [x, y, width, height] in pixels")
    if box[2] < 0 or box[3] < 0:
        raise DataError(f"{where}: bbox {box} has a negative size; expected [x, y, width, height], not two corners")


def _list_ids(categories: Mapping[int, Any]) -> str:
    ids = [str(number) for number in categories]
    return ", ".join(ids) if len(ids) <= 100 else f"{', '.join(ids[:100])} ... ({len(ids)} in all)"


# Several files


@dataclass
class _Merge:
    images: dict[ImageId, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[ImageId, Annotation] = field(default_factory=dict)
    categories: dict[int, dict[str, Any]] = field(default_factory=dict)
    paths: list[Path] = field(default_factory=list)
    differing: Counter[str] = field(default_factory=Counter)
    partial: list[str] = field(default_factory=list)

    def add(self, file: _File) -> None:
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
        self.paths.append(file.path)

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
                raise DataError(
                    f"{path}: {named} has {key} {value}, but an earlier file ({', '.join(map(str, self.paths))}) says "
                    f"{own[key]} for the same id; files merge only if they describe the same images with the same ids"
                )
            self.differing[f"{named.split()[0]} field {key!r}"] += 1


def _same(one: Any, other: Any, tolerance: float) -> bool:
    if one == other:
        return True
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(_same(a, b, tolerance) for a, b in zip(one, other))
    if isinstance(one, int | float) and isinstance(other, int | float):
        return math.isclose(one, other, rel_tol=_RELATIVE_TOLERANCE, abs_tol=tolerance)
    return False
