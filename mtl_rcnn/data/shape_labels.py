"""The labels of Shape Scenes, read off what was painted: COCO annotations and everything that COCO has no word for."""

from __future__ import annotations

from typing import Any

import cv2
import numpy as np

from mtl_rcnn.data.coco_segmentation import mask_to_segmentation
from mtl_rcnn.data.shape_classes import CLASSES, ShapeClass
from mtl_rcnn.data.shape_painter import FLAVOURS, Scene, SceneObject
from mtl_rcnn.data.shape_sprites import COLOURS, FILLS

__all__ = ["DEPTH_SCALE", "SHAPE_CATEGORIES", "annotations_of", "class_map", "distance_map", "image_of", "vocabularies"]

DEPTH_SCALE = 1000
"""Values of the maps of distances per metre."""

_BACKGROUND = 0
_CROWDED = 5  # objects
_OCCLUDED = 0.95  # an object of which less is uncovered counts as occluded
_TRAITS = ("patterned", "occluded", "cut")


def image_of(scene: Scene, image_id: int, split: str) -> dict[str, Any]:
    """The image's entry with its own labels; paths are relative to the folder of the pictures."""
    height, width = scene.id_map.shape
    name = f"{image_id:012d}.png"
    image = {"id": image_id, "file_name": name, "width": width, "height": height}
    image |= {"image_labels": _image_labels(scene), "sem_seg_file_name": f"../semantic_{split}/{name}"}
    if scene.depth is not None:
        image |= {"depth_file_name": f"../depth_{split}/{name}", "depth_scale": DEPTH_SCALE}
    if scene.lines is not None:
        image["text_lines"] = [
            {"polygon": line.polygon.round(2).ravel().tolist(), "transcription": line.transcription, "ignore": False}
            for line in scene.lines
        ]
    return image


def annotations_of(scene: Scene, image_id: int, first_id: int) -> list[dict[str, Any]]:
    """COCO annotations of all objects, from the farthest to the nearest."""
    return [
        {"id": first_id + item.order, "image_id": image_id, **_annotation(item, scene.id_map == item.order + 1)}
        for item in scene.objects
    ]


def class_map(scene: Scene) -> np.ndarray:
    """(H, W) uint8: the category id of the object on top, 0 on the background."""
    return np.array([_BACKGROUND, *(item.kind.category_id for item in scene.objects)], np.uint8)[scene.id_map]


def distance_map(scene: Scene) -> np.ndarray | None:
    """(H, W) uint16, `DEPTH_SCALE` to the metre, 0 where nothing is known; None in flavours without distances."""
    return None if scene.depth is None else np.rint(scene.depth * DEPTH_SCALE).astype(np.uint16)


def vocabularies(flavour: str) -> dict[str, list[dict[str, Any]]]:
    """What the labels of a flavour speak of."""
    scene = ["crowded", *(["lettered"] if len(FLAVOURS[flavour].lines) > 1 else [])]
    parts = {"class": [kind.name for kind in CLASSES], "colour": list(COLOURS), "scene": scene}
    views = [
        {"name": name, "type": "categorical", "values": list(values), "classes": [kind.name]}
        for kind in CLASSES
        for name, values in kind.views.items()
    ]
    return {
        "sem_seg_classes": [
            {"id": _BACKGROUND, "name": "background"},
            *({"id": kind.category_id, "name": kind.name} for kind in CLASSES),
        ],
        "image_labels": [{"name": name, "part": part} for part, names in parts.items() for name in names],
        "attributes": [
            {"name": "colour", "type": "categorical", "values": list(COLOURS)},
            {"name": "fill", "type": "categorical", "values": list(FILLS)},
            {"name": "size", "type": "scalar"},
            {"name": "traits", "type": "multilabel", "values": list(_TRAITS)},
            *views,
        ],
    }


def _category(kind: ShapeClass) -> dict[str, Any]:
    category = {"id": kind.category_id, "name": kind.name, "supercategory": "shape"}
    if kind.keypoints:
        category |= {"keypoints": list(kind.keypoints), "skeleton": [list(pair) for pair in kind.skeleton]}
    return category


SHAPE_CATEGORIES = [_category(kind) for kind in CLASSES]


def _image_labels(scene: Scene) -> list[str]:
    shown = {item.kind.name for item in scene.objects} | {item.colour for item in scene.objects}
    labels = [name for name in (*(kind.name for kind in CLASSES), *COLOURS) if name in shown]
    return labels + ["crowded"] * (len(scene.objects) >= _CROWDED) + ["lettered"] * bool(scene.lines)


def _annotation(item: SceneObject, mask: np.ndarray) -> dict[str, Any]:
    """The COCO fields of one object from its visible pixels, mask (H, W) bool, and its attributes."""
    x, y, width, height = cv2.boundingRect(mask.view(np.uint8))
    annotation = {
        "category_id": item.kind.category_id,
        "iscrowd": 0,
        "bbox": [x, y, width, height],
        "area": int(np.count_nonzero(mask)),
        "segmentation": mask_to_segmentation(mask),
        "visible_fraction": round(item.visible_fraction, 4),
        "attributes": {
            "colour": item.colour,
            "fill": item.fill,
            "size": round(item.size / min(mask.shape), 4),
            "traits": _traits(item, cut=min(x, y, mask.shape[1] - x - width, mask.shape[0] - y - height) == 0),
            **item.view,
        },
    }
    if item.kind.keypoints:
        annotation["keypoints"] = item.keypoints.ravel().tolist()
        annotation["num_keypoints"] = int(np.count_nonzero(item.keypoints[:, 2]))
    return annotation


def _traits(item: SceneObject, cut: bool) -> list[str]:
    holds = (item.fill != FILLS[0], item.visible_fraction < _OCCLUDED, cut)
    return [name for name, is_so in zip(_TRAITS, holds, strict=True) if is_so]
