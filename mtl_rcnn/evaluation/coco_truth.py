"""A dataset's records as COCO ground truth in memory, for one score type.

Images are numbered from 1 in the order of their ids: the order in which COCO breaks ties between equal scores.
Annotations are numbered from 1, since 0 means "unmatched" to the scorers. Category ids are class indices.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from faster_coco_eval import mask as mask_api

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record
from mtl_rcnn.errors import DataError


def number_images(records: Sequence[Record]) -> dict[Any, int]:
    """Image id -> number, in the order of the ids (numbers before texts). Raises DataError if an id occurs twice."""
    ids = [record["image_id"] for record in records]
    numbers = {image_id: number for number, image_id in enumerate(sorted(ids, key=_id_order), start=1)}
    if len(numbers) < len(ids):
        twice = next(image_id for image_id in ids if ids.count(image_id) > 1)
        raise DataError(
            f"dataset '{records[0].get('dataset', '')}': image id {twice!r} occurs twice; ids must be unique"
        )
    return numbers


def coco_ground_truth(
    records: Sequence[Record],
    label_space: LabelSpace,
    iou_type: str,
    *,
    classes: Sequence[int] | None = None,
    num_keypoints: int = 0,
) -> dict[str, Any]:
    """COCO dict {"images", "annotations", "categories"} of the given classes (None: all).

    The area, which decides small / medium / large and scales keypoint distances, is the annotation's, else its mask's,
    else its box's. What is not labelled for the score type is an ignore region, neither a miss nor a false alarm: for
    "keypoints" an annotation without labelled keypoints, as in COCO; for "segm" one without mask (its box is used).

    Args:
        num_keypoints: K, for "keypoints".

    Raises:
        DataError: a keypoint array that is not 3 K long, naming image and annotation.
    """
    numbers = number_images(records)
    indices = range(len(label_space.classes)) if classes is None else sorted(classes)
    wanted = set(indices)
    images, annotations = [], []
    for record in records:
        number = numbers[record["image_id"]]
        images.append({"id": number, "height": record["height"], "width": record["width"]})
        for raw in record.get("annotations", ()):
            if raw["category_id"] in wanted:
                entry = _annotation(raw, record, iou_type, num_keypoints)
                annotations.append({**entry, "id": len(annotations) + 1, "image_id": number})
    return {
        "images": images,
        "annotations": annotations,
        "categories": [{"id": index, "name": label_space.classes[index]} for index in indices],
    }


def _annotation(raw: Mapping[str, Any], record: Record, iou_type: str, num_keypoints: int) -> dict[str, Any]:
    entry = {
        "category_id": raw["category_id"],
        "bbox": list(raw["bbox"]),
        "iscrowd": int(raw.get("iscrowd", 0)),
        "area": _area(raw, record),
    }
    if iou_type == "segm":
        return {**entry, **_mask_fields(raw)}
    if iou_type == "keypoints":
        return {**entry, **_keypoint_fields(raw, record, num_keypoints)}
    return entry


def _mask_fields(raw: Mapping[str, Any]) -> dict[str, Any]:
    if raw.get("segmentation"):
        return {"segmentation": raw["segmentation"]}
    x, y, width, height = raw["bbox"]
    corners = [x, y, x + width, y, x + width, y + height, x, y + height]
    return {"segmentation": [corners], "iscrowd": 1}


def _keypoint_fields(raw: Mapping[str, Any], record: Record, num_keypoints: int) -> dict[str, Any]:
    points = raw.get("keypoints") or [0] * (3 * num_keypoints)
    if len(points) != 3 * num_keypoints:
        place = f"{record.get('file_name', '')}: image {record['image_id']!r}, annotation {raw.get('id')!r}"
        raise DataError(
            f"{place}: 'keypoints' has {len(points)} numbers, expected {3 * num_keypoints}"
            f" ({num_keypoints} keypoints x (x, y, visibility))"
        )
    labelled = sum(visibility > 0 for visibility in points[2::3])
    count = labelled if raw.get("num_keypoints") is None or not raw.get("keypoints") else raw["num_keypoints"]
    return {"keypoints": list(points), "num_keypoints": count}


def _area(raw: Mapping[str, Any], record: Record) -> float:
    if raw.get("area") is not None:
        return float(raw["area"])
    if raw.get("segmentation"):
        return _mask_area(raw["segmentation"], record["height"], record["width"])
    return float(raw["bbox"][2]) * float(raw["bbox"][3])


def _mask_area(segmentation: Any, height: int, width: int) -> float:
    """Pixels of the union of the polygons, or of an RLE with list or text counts."""
    if isinstance(segmentation, Mapping) and not isinstance(segmentation["counts"], list):
        return float(mask_api.area(dict(segmentation)))
    rle = mask_api.frPyObjects(segmentation, height, width)
    return float(mask_api.area(mask_api.merge(rle) if isinstance(rle, list) else rle))


def _id_order(image_id: Any) -> tuple[bool, Any]:
    return (isinstance(image_id, str), image_id)
