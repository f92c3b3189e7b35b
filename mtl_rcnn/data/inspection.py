"""Every fault of a dataset, not only the first: labels, images, and what a repaired annotation file would hold."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from mtl_rcnn.data.coco import CocoData, read_coco
from mtl_rcnn.data.coco_file import Annotation, box_doubts
from mtl_rcnn.data.faults import DROP_ANNOTATION, DROP_IMAGE, DROPPED_IMAGE, Fault
from mtl_rcnn.data.image_file import strict_decoding
from mtl_rcnn.data.mapper import read_image
from mtl_rcnn.data.target import Record, Target, place_of
from mtl_rcnn.errors import UnreadableImageError


def label_faults(records: Iterable[Record], targets: Mapping[str, Target]) -> Iterator[Fault]:
    """Faults of annotations that were readable: of their boxes, and of every task's labels. What several tasks find,
    since they read the same field, comes once."""
    for record in records:
        for annotation in record["annotations"]:
            if "bbox" in annotation:
                located = {**annotation, "image_id": record["image_id"]}
                yield from box_doubts(record, located, place_of(record, annotation))
        found: list[Fault] = []
        for target in targets.values():
            found += [fault for fault in target.faults(record) if fault not in found]
        yield from found


def image_faults(records: Sequence[Record], workers: int, advance: Callable[[int], None]) -> Iterator[Fault]:
    """Image files that cannot be decoded to their end, or whose size is not the record's.

    Args:
        records: whose images are read, all of them.
        workers: threads; decoding does not hold Python's lock.
        advance: called with 1 after each image.
    """
    # One switch for all threads: each would else give the decoder's back while others are at work.
    with strict_decoding(), ThreadPoolExecutor(max(workers, 1)) as pool:
        for fault in pool.map(_image_fault, records):
            advance(1)
            if fault is not None:
                yield fault


def missing_image(record: Record) -> Fault:
    """The fault of a record without an image file."""
    named = f"{record['file_name']} (dataset {record['dataset']!r}, image id {record['image_id']})"
    text = f"{named}: no such image file; correct the dataset's 'images' or data.root"
    return Fault("image file missing", text, record["file_name"], record["image_id"], repair=DROPPED_IMAGE)


def _image_fault(record: Record) -> Fault | None:
    try:
        read_image(record)
    except UnreadableImageError as error:
        return Fault(error.kind, str(error), record["file_name"], record["image_id"], repair=DROPPED_IMAGE)
    return None


def locate(faults: Sequence[Fault], files: Sequence[Path]) -> list[Fault]:
    """The faults with the annotation file each is in: the first one whose annotation has the field at fault."""
    if all(fault.file for fault in faults):
        return list(faults)
    contents = [(path, _annotations(path)) for path in files]

    def file_of(fault: Fault) -> str:
        holders = [(path, found[fault.annotation_id]) for path, found in contents if fault.annotation_id in found]
        with_field = [path for path, entry in holders if fault.field in entry]
        return str(next(iter(with_field or [path for path, _ in holders]), files[0]))

    return [fault if fault.file else replace(fault, file=file_of(fault)) for fault in faults]


def _annotations(path: Path) -> Mapping[int | str, Annotation]:
    data = read_coco([path], report=lambda fault: None)
    return {entry["id"]: entry for entries in data.annotations.values() for entry in entries}


def repair(data: CocoData, faults: Iterable[Fault]) -> None:
    """Makes the faults' repairs in place. Faults without a repair, and what reading left out already, stay as is."""
    images: set[int | str] = set()
    dropped: set[int | str] = set()
    changed: dict[int | str, list[Fault]] = {}
    for fault in faults:
        if fault.repair is None:
            continue
        if fault.repair.drop == DROP_IMAGE:
            images.add(fault.image_id)
        elif fault.repair.drop == DROP_ANNOTATION:
            dropped.add(fault.annotation_id)
        elif fault.repair.fields or fault.repair.without:
            changed.setdefault(fault.annotation_id, []).append(fault)
    for image_id in images & data.images.keys():
        del data.images[image_id], data.annotations[image_id]
    for image_id, entries in data.annotations.items():
        data.annotations[image_id] = [
            _changed(entry, changed.get(entry["id"], ())) for entry in entries if entry["id"] not in dropped
        ]


def _changed(entry: Annotation, faults: Iterable[Fault]) -> Annotation:
    for fault in faults:
        kept = {key: value for key, value in entry.items() if key not in fault.repair.without}
        entry = {**kept, **fault.repair.fields}
    return entry


def write_coco(path: Path, data: CocoData) -> None:
    """Writes one COCO JSON with everything that was merged; complete or not at all."""
    content = {
        **data.extra,
        "images": list(data.images.values()),
        "annotations": [entry for entries in data.annotations.values() for entry in entries],
        "categories": list(data.categories),
        "vocabularies": {name: list(entries) for name, entries in data.vocabularies.items()},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content, allow_nan=False), encoding="utf-8")
    os.replace(temporary, path)
