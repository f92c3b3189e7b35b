"""Labels that are image files of their own, one value per pixel: found, checked against their image, read.

A record names such a file in a field whose name ends in `file_name`. A dataset that declares a task needs the file for
every image; where it declares nothing, images that name a file are labelled.
"""

from __future__ import annotations

import os
from typing import Any

import numpy as np
from PIL import Image

from mtl_rcnn.data.faults import Fault, refuse
from mtl_rcnn.data.image_file import strict_decoding
from mtl_rcnn.data.target import Record


def is_labelled(record: Record, field: str, declared: bool | None) -> bool:
    """Whether an image is labelled by the file that `field` names: declared, or left open and named."""
    return declared is True or (declared is None and record.get(field) is not None)


def find_fault(record: Record, field: str, task: str) -> Fault | None:
    """What is wrong with the file of a labelled image, as far as its head tells: it is not named, is not there, is no
    image, has several values per pixel, or another size than its image. Reads no pixels."""
    path = record.get(field)
    if not isinstance(path, str):
        text = (
            f"has no '{field}', but the dataset declares the task '{task}': name the file in the image's entry or by "
            f"the dataset's image_fields, or take '{task}' out of the dataset's `tasks`"
        )
        return label_fault("no label map", text, record)
    try:
        with Image.open(path) as image:
            bands, (width, height) = image.getbands(), image.size
    except OSError as error:
        return _unreadable(path, record, error)
    if len(bands) > 1:
        text = (
            f"{path} has {len(bands)} values per pixel ({', '.join(bands)}): expected one, such as an 8 or 16 bit PNG"
        )
        return label_fault("label map in colours", text, record, path)
    if (height, width) != (record["height"], record["width"]):
        text = (
            f"{path} is {width} x {height} pixels (width x height): expected its image's {record['width']} x "
            f"{record['height']}, one label per pixel"
        )
        return label_fault("label map of another size", text, record, path)
    return None


def read_map(record: Record, field: str, task: str) -> np.ndarray:
    """(H, W) of an image's size: the values as the file holds them, of any integer or float dtype.

    Raises:
        DataError: what `find_fault` finds, or a file that cannot be decoded.
    """
    fault = find_fault(record, field, task)
    if fault is None:
        values = _decode(record[field], record)
        if isinstance(values, np.ndarray):
            return values
        fault = values
    refuse(fault)
    raise AssertionError("a fault of a label map is fatal")


def label_fault(kind: str, text: str, record: Record, path: str = "") -> Fault:
    """A fault in the labels of a whole image, that names the image."""
    where = f"dataset '{record['dataset']}', image {record['image_id']}"
    return Fault(kind, f"{where} {text}" if not path else f"{where}: {text}", path, record["image_id"])


def positive_number(value: Any) -> bool:
    """Whether a JSON value is a finite number above 0."""
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value < float("inf")


def _decode(path: str, record: Record) -> np.ndarray | Fault:
    try:
        with strict_decoding(), Image.open(path) as image:
            values = np.asarray(image)
    except Exception as error:  # decoders raise anything on damaged files
        return _unreadable(path, record, error)
    return values.astype(np.uint8) if values.dtype == bool else values


def _unreadable(path: str, record: Record, error: Exception) -> Fault:
    if not os.path.exists(path):
        text = f"there is no label file {path}: correct the name in the image's entry, or data.root"
        return label_fault("label map missing", text, record, path)
    text = f"{path}: the label file cannot be read ({error}); replace it"
    return label_fault("damaged label map", text, record, path)
