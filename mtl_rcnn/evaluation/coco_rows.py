"""Rows of standard COCO results JSON: made from predictions, and checked before they are scored.

A row is {"image_id", "category_id", "score"} and one of "bbox" [x, y, w, h] in pixels, "segmentation" (RLE with text
counts) or "keypoints" [x, y, score, x, y, score ...]. Ids are the dataset's own, so that files are usable elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from faster_coco_eval import mask as mask_api
from torch import Tensor

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record
from mtl_rcnn.errors import DataError
from mtl_rcnn.evaluation.evaluator import dataset_category_id

FIELDS = {"bbox": "bbox", "segm": "segmentation", "keypoints": "keypoints"}
"""The one field each score type reads of a row. Others are ignored: a box beside a mask does not change its area."""


def xyxy_to_xywh(boxes: Tensor) -> list[list[float]]:
    """(N, 4) XYXY pixels -> N lists [x, y, w, h]: the differences are taken in float64."""
    corners = boxes.detach().to("cpu", torch.float64)
    return torch.cat([corners[:, :2], corners[:, 2:] - corners[:, :2]], dim=1).tolist()


def encode_masks(masks: Tensor) -> list[dict[str, Any]]:
    """(N, H, W) bool -> N COCO RLEs {"size": [H, W], "counts": text}, ready for JSON."""
    if masks.shape[0] == 0:
        return []
    planes = masks.detach().to("cpu", torch.uint8).permute(1, 2, 0).numpy()
    return [_with_text_counts(rle) for rle in mask_api.encode(np.asfortranarray(planes))]


def _with_text_counts(rle: Mapping[str, Any]) -> dict[str, Any]:
    counts = rle["counts"]
    text = counts.decode("ascii") if isinstance(counts, bytes) else counts
    return {"size": [int(side) for side in rle["size"]], "counts": text}


class RowReader:
    """Turns rows with a dataset's ids into rows with image numbers and class indices, checking each.

    Args:
        records: the dataset's records; all share one `category_ids`.
        image_numbers: image id -> number used while scoring.
        label_space: classes of the network.
        classes: class indices to keep.
        iou_type: "bbox", "segm" or "keypoints".
        num_keypoints: K, for "keypoints".
    """

    def __init__(
        self,
        records: Sequence[Record],
        image_numbers: Mapping[Any, int],
        label_space: LabelSpace,
        classes: Sequence[int],
        iou_type: str,
        num_keypoints: int = 0,
    ) -> None:
        self.dataset = str(records[0].get("dataset", "")) if records else ""
        self.sizes = {record["image_id"]: [record["height"], record["width"]] for record in records}
        self.image_numbers = image_numbers
        self.class_of = _class_of_category(records, len(label_space.classes))
        self.classes = set(classes)
        self.field = FIELDS[iou_type]
        self.num_keypoints = num_keypoints

    def __call__(self, rows: Sequence[Any]) -> list[dict[str, Any]]:
        """New rows of the kept classes, in order. Raises DataError naming the first bad row and what was expected."""
        kept = []
        for index, row in enumerate(rows):
            fault = self._fault(row) or (self._value_fault(row) if self._is_kept(row) else None)
            if fault is not None:
                raise DataError(f"results row {index} of dataset '{self.dataset}': {fault}")
            if self._is_kept(row):
                kept.append(self._converted(row))
        return kept

    def _is_kept(self, row: Mapping[str, Any]) -> bool:
        return self.class_of[row["category_id"]] in self.classes

    def _converted(self, row: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "image_id": self.image_numbers[row["image_id"]],
            "category_id": self.class_of[row["category_id"]],
            "score": float(row["score"]),
            self.field: row[self.field],
        }

    def _fault(self, row: Any) -> str | None:
        if not isinstance(row, Mapping):
            return f"expected an object with image_id, category_id, {self.field} and score, got {_short(row)}"
        missing = [key for key in ("image_id", "category_id", self.field, "score") if key not in row]
        if missing:
            return f"'{missing[0]}' is missing; a row needs image_id, category_id, {self.field} and score"
        if not _hashable_in(row["image_id"], self.image_numbers):
            return f"image_id {row['image_id']!r} is not in the dataset; {_examples('image ids', self.image_numbers)}"
        if not _hashable_in(row["category_id"], self.class_of):
            return (
                f"category_id {row['category_id']!r} is not in the dataset; {_examples('category ids', self.class_of)}"
            )
        if not _is_number(row["score"]):
            return f"'score' is {_short(row['score'])}, expected a finite number"
        return None

    def _value_fault(self, row: Mapping[str, Any]) -> str | None:
        value = row[self.field]
        if self.field == "bbox" and not _numbers(value, 4):
            return f"'bbox' is {_short(value)}, expected [x, y, width, height] in pixels"
        if self.field == "keypoints" and not _numbers(value, 3 * self.num_keypoints):
            count = 3 * self.num_keypoints
            return f"'keypoints' is {_short(value)}, expected {count} numbers: {self.num_keypoints} x (x, y, score)"
        if self.field == "segmentation":
            return _rle_fault(value, self.sizes[row["image_id"]])
        return None


def _class_of_category(records: Sequence[Record], num_classes: int) -> dict[int, int]:
    """The dataset's category id -> class index."""
    if not records:
        return {}
    first = records[0]
    for record in records:
        if record.get("category_ids") != first.get("category_ids"):
            pair = f"images {first['image_id']!r} and {record['image_id']!r}"
            raise DataError(
                f"dataset '{first.get('dataset', '')}': {pair} number their categories differently;"
                " evaluate them as two datasets"
            )
    ids = [dataset_category_id(first, index) for index in range(num_classes)]
    return {category_id: index for index, category_id in enumerate(ids) if category_id is not None}


def _rle_fault(value: Any, size: list[int]) -> str | None:
    if not isinstance(value, Mapping) or not isinstance(value.get("counts"), (str, bytes)):
        return f"'segmentation' is {_short(value)}, expected an RLE {{'size': {size}, 'counts': text}}"
    if list(value.get("size", ())) != size:
        return f"'segmentation' has size {value.get('size')}, the image has [height, width] {size}"
    try:
        mask_api.area(dict(value))
    except RuntimeError as error:
        return f"'segmentation' has counts that cannot be decoded ({error})"
    return None


def _numbers(value: Any, count: int) -> bool:
    return isinstance(value, Sequence) and len(value) == count and all(_is_number(item) for item in value)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _hashable_in(value: Any, mapping: Mapping[Any, Any]) -> bool:
    return isinstance(value, (int, str)) and value in mapping


def _examples(what: str, mapping: Mapping[Any, Any]) -> str:
    shown = ", ".join(repr(key) for key in list(mapping)[:3])
    return f"it has {len(mapping)} {what}" + (f" such as {shown}" if shown else "")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
