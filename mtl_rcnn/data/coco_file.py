"""One COCO JSON file: parsed, and every entry checked. Knows no task.

The rules report to a sink. If that returns instead of raising, the faulty entry is left out and reading goes on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mtl_rcnn.data.faults import DROPPED_ANNOTATION, DROPPED_IMAGE, Fault, Repair, Sink, refuse
from mtl_rcnn.data.label_space import Vocabularies

Annotation = dict[str, Any]
ImageId = int | str

_WITHOUT_AREA = Repair("remove the area", without=("area",))
_NUMBERS = {int, float}
_HUGE = 2.0**62
SECTIONS = ("images", "annotations", "categories")
VOCABULARIES = "vocabularies"


@dataclass
class CocoFile:
    """What one file holds.

    Attributes:
        images, annotations, categories: id -> entry.
        extra: what else stands at the top level, such as licences.
        vocabularies: name -> entries with an `id` each.
        dropped_images, dropped_annotations: ids of entries that were left out for a fault.
    """

    path: Path
    images: dict[ImageId, dict[str, Any]] = field(default_factory=dict)
    annotations: dict[ImageId, Annotation] = field(default_factory=dict)
    categories: dict[int, dict[str, Any]] = field(default_factory=dict)
    extra: dict[str, Any] = field(default_factory=dict)
    vocabularies: Vocabularies = field(default_factory=dict)
    dropped_images: set[ImageId] = field(default_factory=set)
    dropped_annotations: set[ImageId] = field(default_factory=set)


def read_file(path: Path, report: Sink = refuse) -> CocoFile:
    """Reads a file; one that is no COCO JSON at all is empty, if the sink lets it pass."""
    file = CocoFile(path)
    content = _parse(path, report)
    if content is None:
        return file
    file.extra = {key: value for key, value in content.items() if key not in (*SECTIONS, VOCABULARIES)}
    file.vocabularies = parse_vocabularies(content.get(VOCABULARIES, {}), str(path), report)
    file.images = _by_id(path, content["images"], "image", ("file_name", "height", "width"), report)
    file.categories = _by_id(path, content["categories"], "category", ("name",), report)
    file.annotations = _by_id(path, content["annotations"], "annotation", ("image_id", "category_id"), report)
    _drop_faulty(file.categories, lambda category: _category_faults(path, category), report)
    file.dropped_images = _drop_faulty(file.images, lambda image: _image_faults(path, image), report)
    # An annotation of an image that has a fault of its own is not at fault.
    images, known_ids = file.images.keys() | file.dropped_images, _list_ids(file.categories)
    file.dropped_annotations = _drop_faulty(
        file.annotations,
        lambda annotation: _annotation_faults(path, annotation, images, file.categories, known_ids),
        report,
    )
    for number in [n for n, entry in file.annotations.items() if entry["image_id"] in file.dropped_images]:
        del file.annotations[number]
    return file


def parse_vocabularies(given: Any, where: str, report: Sink = refuse) -> Vocabularies:
    """Vocabularies as a file or a configuration writes them: name -> list of entries, or of names; an entry without
    `id` has its position as id.

    Args:
        where: file or key, for messages.
        report: what to do with a fault; where it returns, the vocabulary is left out.
    """
    if not isinstance(given, Mapping):
        report(_vocabulary_fault(where, f"is a {type(given).__name__}", "an object of lists, name -> entries"))
        return {}
    return {name: read for name, entries in given.items() if (read := _entries(name, entries, where, report))}


def _entries(vocabulary: str, given: Any, where: str, report: Sink) -> tuple[dict[str, Any], ...]:
    if not isinstance(given, Sequence) or isinstance(given, str):
        report(_vocabulary_fault(f"{where}: {vocabulary}", f"is {given!r}", "a list of entries or names"))
        return ()
    entries: list[dict[str, Any]] = []
    for position, entry in enumerate(given):
        read = {"name": entry} if isinstance(entry, str) else entry
        if not isinstance(read, Mapping) or not isinstance(read.get("name"), str) or not read["name"]:
            text = "a name, or an object with a 'name'"
            report(_vocabulary_fault(f"{where}: {vocabulary}[{position}]", f"is {entry!r}", text))
            return ()
        entries.append({"id": position, **read})
    for key in ("id", "name"):
        values = [entry[key] for entry in entries]
        twice = [value for position, value in enumerate(values) if value in values[:position]]
        if twice:
            text = f"has the {key} {twice[0]!r} twice"
            report(_vocabulary_fault(f"{where}: {vocabulary}", text, "entries that differ"))
            return ()
    return tuple(entries)


def _vocabulary_fault(where: str, found: str, expected: str) -> Fault:
    return Fault("vocabulary", f"{where}: the vocabulary {found}; expected {expected}", where.split(": ")[0])


def box_doubts(image: Mapping[str, Any], annotation: Annotation, where: str) -> Iterator[Fault]:
    """Boxes that training copes with, but that nobody can have meant: empty ones, and ones that leave the image.

    Args:
        where: start of the messages.
    """
    x, y, width, height = annotation["bbox"]
    ids = {"image_id": annotation["image_id"], "annotation_id": annotation["id"], "field": "bbox", "fatal": False}
    shown = f"{where}: bbox {annotation['bbox']}"
    if min(width, height) == 0:
        text = f"{shown} has no area; expected a width and a height above 0 (it trains nothing)"
        yield Fault("empty box", text, repair=DROPPED_ANNOTATION, **ids)
        return
    left, top = max(x, 0), max(y, 0)
    right, bottom = min(x + width, image["width"]), min(y + height, image["height"])
    outside = max(left - x, top - y, x + width - right, y + height - bottom)
    if outside <= OUTSIDE_TOLERANCE:
        return
    size = f"{image['width']} x {image['height']} pixels"
    if right <= left or bottom <= top:
        text = f"{shown} lies outside the image of {size}; expected [x, y, width, height] within it"
        yield Fault("box outside the image", text, repair=DROPPED_ANNOTATION, **ids)
        return
    clipped = Repair("clip the box to the image", fields={"bbox": [left, top, right - left, bottom - top]})
    text = f"{shown} reaches {outside:g} pixels beyond the image of {size}; expected a box within it"
    yield Fault("box outside the image", text, repair=clipped, **ids)


OUTSIDE_TOLERANCE = 1.0
"""Pixels by which a box may leave its image: annotation tools round."""


def _parse(path: Path, report: Sink) -> dict[str, Any] | None:
    """The JSON object with its three lists; None if it is no such thing."""

    def fault(kind: str, message: str) -> None:
        report(Fault(kind, message, str(path)))

    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return fault(
            "annotation file missing", f"{path}: no such annotation file; correct the dataset's 'annotations' or "
            "data.root"
        )  # fmt: skip
    except OSError as error:
        return fault("annotation file unreadable", f"{path}: the annotation file cannot be read ({error.strerror})")
    except json.JSONDecodeError as error:
        return fault(
            "not JSON",
            f"{path}, line {error.lineno}, column {error.colno}: not JSON ({error.msg}); the file may be truncated",
        )
    except UnicodeDecodeError as error:
        return fault("not JSON", f"{path}: not JSON (byte {error.start} is not UTF-8 text)")
    except (RecursionError, ValueError) as error:  # nested too deeply; a number of thousands of digits
        return fault("not JSON", f"{path}: not a JSON that can be read ({error})")
    if not isinstance(content, dict):
        return fault(
            "not COCO",
            f"{path}: a {type(content).__name__} at the top level; expected a COCO JSON object with 'images'",
        )
    missing = [section for section in SECTIONS if not isinstance(content.get(section), list)]
    if missing:
        return fault(
            "not COCO",
            f"{path}: no list {missing[0]!r} at the top level (found: {', '.join(map(repr, content)) or 'nothing'}); "
            "expected a COCO JSON with 'images', 'annotations' and 'categories'",
        )
    return content


def _by_id(
    path: Path, entries: list[Any], kind: str, required: Sequence[str], report: Sink
) -> dict[Any, dict[str, Any]]:
    result: dict[Any, dict[str, Any]] = {}
    repeated: list[dict[str, Any]] = []
    for position, entry in enumerate(entries):
        fault = _entry_fault(path, position, entry, kind, required)
        if fault is not None:
            report(fault)
        elif entry["id"] not in result:
            result[entry["id"]] = entry
        else:
            report(_repeated(path, entry, kind, result[entry["id"]]))
            if kind == "annotation" and entry != result[entry["id"]]:
                repeated.append(entry)
    free = max((number for number in result if isinstance(number, int)), default=0)
    for number, entry in enumerate(repeated, free + 1):  # only reached when faults are collected
        result[number] = {**entry, "id": number}
    return result


def _entry_fault(path: Path, position: int, entry: Any, kind: str, required: Sequence[str]) -> Fault | None:
    """What is wrong with an entry before its content is looked at."""
    has_id = isinstance(entry, dict) and _is_id(entry.get("id"))
    repair = Repair(f"leave the {kind} out")
    place = {"file": str(path), **(_ids(kind, entry) if has_id else {})}
    for key in ("id", *required):
        if not isinstance(entry, dict) or key not in entry:
            named = f"{kind} {entry['id']}" if has_id else f"{kind} number {position}"
            message = f"{path}: {named} has no {key!r}; every COCO {kind} needs one"
            return Fault(f"{kind} without {key}", message, repair=repair, **place)
    if not has_id:
        message = f"{path}: {kind} number {position} has id {entry['id']!r}; expected an integer or a string"
        return Fault(f"{kind} id", message, repair=repair, **place)
    return None


def _repeated(path: Path, entry: Mapping[str, Any], kind: str, first: Mapping[str, Any]) -> Fault:
    message = f"{path}: {kind} id {entry['id']} occurs twice; ids must differ within a file"
    differs = kind == "annotation" and entry != first
    repair = Repair("give the second annotation a free id" if differs else f"leave the second {kind} out")
    return Fault(f"duplicate {kind} id", message, str(path), repair=repair, **_ids(kind, entry))


def _ids(kind: str, entry: Mapping[str, Any]) -> dict[str, Any]:
    if kind == "image":
        return {"image_id": entry["id"]}
    if kind == "annotation":
        image_id = entry.get("image_id")
        return {"annotation_id": entry["id"], "image_id": image_id if _is_id(image_id) else None}
    return {}


def _drop_faulty(entries: dict[Any, dict[str, Any]], rules: Any, report: Sink) -> set[Any]:
    """Reports what the rules find, leaves the faulty entries out, and returns their ids. Where the repair only takes
    fields away, the entry stays without them."""
    faulty: set[Any] = set()
    for number, entry in entries.items():
        for fault in list(rules(entry)):
            report(fault)
            if not fault.repair.without:
                faulty.add(number)
            for key in fault.repair.without:
                entry.pop(key, None)
    for number in faulty:
        del entries[number]
    return faulty


def _category_faults(path: Path, category: Mapping[str, Any]) -> Iterator[Fault]:
    repair = Repair("leave the category out")
    if not isinstance(category["id"], int):
        message = f"{path}: category id {category['id']!r} is not an integer; COCO category ids are integers"
        yield Fault("category id", message, str(path), repair=repair)
    elif not isinstance(category["name"], str) or not category["name"]:
        message = f"{path}: category {category['id']}: name is {category['name']!r}; expected a text"
        yield Fault("category name", message, str(path), repair=repair)


def _image_faults(path: Path, image: Mapping[str, Any]) -> Iterator[Fault]:
    where, place = f"{path}: image {image['id']}", {"file": str(path), "image_id": image["id"]}
    for key in ("height", "width"):
        if isinstance(image[key], bool) or not isinstance(image[key], int) or image[key] <= 0:
            message = f"{where}: {key} is {image[key]!r}; expected a positive number of pixels"
            yield Fault("image size", message, repair=DROPPED_IMAGE, **place)
    if not isinstance(image["file_name"], str) or not image["file_name"]:
        message = f"{where}: file_name is {image['file_name']!r}; expected the image file's name"
        yield Fault("image file name", message, repair=DROPPED_IMAGE, **place)


def _annotation_faults(
    path: Path, annotation: Annotation, images: Any, categories: Mapping[int, Any], known_ids: str
) -> Iterator[Fault]:
    found: tuple[str, str] | None = None
    image_id, category_id = annotation["image_id"], annotation["category_id"]
    if not isinstance(image_id, Hashable) or image_id not in images:
        found = "annotation of an unknown image", f"image_id {image_id} is not among the file's {len(images)} images"
    elif not isinstance(category_id, Hashable) or category_id not in categories:
        text = f"unknown category_id {category_id}; the file's categories have ids {known_ids}"
        found = "annotation of an unknown category", text
    elif annotation.setdefault("iscrowd", 0) not in (0, 1):
        found = "iscrowd", f"iscrowd is {annotation['iscrowd']!r}; expected 0 or 1"
    elif "bbox" in annotation:
        found = _box_fault(annotation["bbox"])
    repair = DROPPED_ANNOTATION
    if found is None and not _is_area(annotation.get("area")):
        found, repair = ("area", f"area is {annotation['area']!r}; expected pixels"), _WITHOUT_AREA
    if found is not None:
        kind, text = found
        message = f"{path}: image {image_id}, annotation {annotation['id']}: {text}"
        yield Fault(kind, message, str(path), repair=repair, **_ids("annotation", annotation))


def _box_fault(box: Any) -> tuple[str, str] | None:
    if not isinstance(box, list) or len(box) != 4 or not are_numbers(box):
        return "malformed box", f"bbox is {box!r}; expected 4 finite numbers [x, y, width, height] in pixels"
    if box[2] < 0 or box[3] < 0:
        return "negative box", f"bbox {box} has a negative size; expected [x, y, width, height], not two corners"
    return None


def are_numbers(values: Sequence[Any]) -> bool:
    """Whether JSON values are all finite numbers, of a size that any library can hold."""
    if not {*map(type, values)} <= _NUMBERS:
        return False
    # Built-in functions over the whole list: there are millions of lists.
    try:
        return not values or (math.isfinite(sum(values)) and min(values) > -_HUGE and max(values) < _HUGE)
    except OverflowError:  # an integer that no float can hold
        return False


def _is_area(value: Any) -> bool:
    """Whether evaluation can use it; without one it measures the mask or the box."""
    return value is None or (are_numbers([value]) and value >= 0)


def _is_id(value: Any) -> bool:
    return isinstance(value, int | str) and not isinstance(value, bool)


def _list_ids(categories: Mapping[int, Any]) -> str:
    ids = [str(number) for number in categories]
    return ", ".join(ids) if len(ids) <= 100 else f"{', '.join(ids[:100])} ... ({len(ids)} in all)"
