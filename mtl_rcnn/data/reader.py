"""From a dataset's specification to its content: COCO JSON files, or whatever a `DatasetReader` reads.

reader:
  _target_: mtl_rcnn.data.reader.ImageFolder
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from mtl_rcnn.config.resolve import resolve
from mtl_rcnn.data.coco import CocoData, read_coco
from mtl_rcnn.data.coco_file import parse_vocabularies
from mtl_rcnn.data.dataset_spec import DatasetSpec, is_file_field
from mtl_rcnn.data.faults import DROPPED_IMAGE, Fault, Sink, refuse
from mtl_rcnn.data.image_file import IMAGE_SUFFIXES
from mtl_rcnn.errors import ConfigError

_TURNED = (5, 6, 7, 8)
"""Values of the EXIF orientation that exchange width and height."""


class DatasetReader(ABC):
    """Reads a dataset that is no COCO JSON. Its arguments stand beside its `_target_`."""

    @abstractmethod
    def read(self, spec: DatasetSpec, report: Sink) -> CocoData:
        """The dataset's content in COCO's terms: entries of images with whatever fields tasks read, annotations,
        categories (perhaps none) and vocabularies.

        Args:
            spec: of the dataset; `images` and `annotations` are paths.
            report: what to do with faults; where it returns, what is at fault is left out.
        """


class ImageFolder(DatasetReader):
    """All images of a folder, by name, without labels of their own: `image_fields` names the files that hold them.

    Args:
        pattern: of the names to take, such as "*.jpg"; None takes every image.
    """

    def __init__(self, pattern: str | None = None) -> None:
        self.pattern = pattern

    def read(self, spec: DatasetSpec, report: Sink) -> CocoData:
        """An entry per image, ids from 1 in the order of the names."""
        folder = Path(spec.images)
        if not folder.is_dir():
            report(Fault("image folder missing", f"dataset {spec.name!r}: no image folder {folder}", str(folder)))
            return coco_data(folder, ())
        return coco_data(folder, image_entries(folder, sorted(folder.glob(self.pattern or "*")), report))


def read_dataset(spec: DatasetSpec, report: Sink = refuse) -> CocoData:
    """The content of a dataset, with the fields and vocabularies that its specification adds.

    A text in `image_fields` may hold {stem} and {name} of the image file; where the field's name ends in `file_name`,
    it is the path of a file of labels, and images without such a file do not get the field.

    Args:
        spec: of the dataset.
        report: what to do with faults; where it returns, what is at fault is left out.

    Raises:
        DataError: a fault, by the default `report`.
        ConfigError: a reader that is none, or whose arguments do not fit; vocabularies that contradict the files.
    """
    data = read_coco(spec.annotations, report) if spec.reader is None else _reader(spec).read(spec, report)
    exists = _Listing()
    for entry in data.images.values():
        entry.update(_fields_of(entry, spec, exists))
    own = parse_vocabularies(spec.vocabularies, f"dataset {spec.name!r}", report)
    data.vocabularies = {**data.vocabularies, **own}
    return data


def coco_data(source: Path, images: Iterable[dict[str, Any]], **parts: Any) -> CocoData:
    """What a reader returns: entries of images without annotations or categories, but for `parts`."""
    by_id = {entry["id"]: entry for entry in images}
    given = {"annotations": {image_id: [] for image_id in by_id}, "categories": (), "notes": (), **parts}
    given["vocabularies"] = parse_vocabularies(given.get("vocabularies", {}), str(source))
    return CocoData((source,), by_id, **given)


def image_entries(folder: Path, paths: Sequence[Path], report: Sink) -> Iterator[dict[str, Any]]:
    """COCO's entries of image files: `id` from 1, `file_name` relative to `folder`, upright `height` and `width`.

    Only the files' heads are read. What is no image by its ending is passed over; what cannot be opened is a fault.
    """
    images = [path for path in paths if path.suffix.lower() in IMAGE_SUFFIXES]
    for number, path in enumerate(images, 1):
        try:
            width, height = _upright_size(path)
        except OSError as error:
            text = f"{path}: the image cannot be read ({error}); replace the file or move it away"
            report(Fault("damaged image", text, str(path), repair=DROPPED_IMAGE))
            continue
        yield {"id": number, "file_name": path.relative_to(folder).as_posix(), "height": height, "width": width}


def _upright_size(path: Path) -> tuple[int, int]:
    """Width and height in pixels, turned as the EXIF orientation says."""
    with Image.open(path) as image:
        width, height = image.size
        return (height, width) if image.getexif().get(0x0112) in _TURNED else (width, height)


def _reader(spec: DatasetSpec) -> DatasetReader:
    key = f"dataset {spec.name!r}: reader"
    arguments = dict(spec.reader or {})
    cls = resolve(str(arguments.pop("_target_", "")), DatasetReader, f"{key}._target_")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ConfigError(f"{key}: {cls.__name__} does not take these arguments ({error})") from error


def _fields_of(entry: dict[str, Any], spec: DatasetSpec, exists: _Listing) -> dict[str, Any]:
    path = Path(entry["file_name"])
    found = {}
    for key, value in spec.image_fields.items():
        text = value.format(stem=path.stem, name=path.name) if isinstance(value, str) else value
        if not is_file_field(key):
            found[key] = text
        elif os.path.abspath(text) in exists:
            found[key] = os.path.abspath(text)
    return found


class _Listing:
    """Which files there are, one listing per folder: asking for each of 100,000 files takes minutes on a network."""

    def __init__(self) -> None:
        self._folders: dict[str, set[str]] = {}

    def __contains__(self, path: str) -> bool:
        folder, name = os.path.split(path)
        if folder not in self._folders:
            self._folders[folder] = set(os.listdir(folder)) if os.path.isdir(folder) else set()
        return name in self._folders[folder]
