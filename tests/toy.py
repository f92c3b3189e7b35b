"""A tiny COCO dataset for tests: six images that are not square, three classes, one with points, all kinds of labels.

| image | holds |
|---|---|
| 11 | a figure (polygon, points) and a disc (polygon of two parts) |
| 12 | a figure (RLE, points) and a square without a segmentation |
| 13 | a crowd of discs (RLE) and a disc |
| 14 | nothing |
| 15 | a figure whose points are all unlabelled, and two squares |
| 16 | a figure with hidden points at the border |

The images' own labels: words (all but 16), maps of classes and of distances (all but 14 and 15), lines of text (11, 12,
and none on 14). Objects of 11, 12 and 15 have attributes, in part.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pycocotools.mask as coco_mask
from PIL import Image, ImageDraw

SIZES = {11: (48, 64), 12: (64, 48), 13: (40, 80), 14: (50, 70), 15: (72, 44), 16: (36, 60)}
"""Image id -> height, width in pixels."""

CATEGORIES = [
    {
        "id": 2,
        "name": "figure",
        "supercategory": "toy",
        "keypoints": ["head", "left_hand", "right_hand"],
        "skeleton": [[1, 2], [1, 3]],
    },
    {"id": 5, "name": "disc", "supercategory": "toy"},
    {"id": 9, "name": "square", "supercategory": "toy"},
]

VOCABULARIES = {
    "sem_seg_classes": [{"id": 0, "name": "ground"}, {"id": 1, "name": "thing"}, {"id": 4, "name": "edge"}],
    "image_labels": [
        {"name": "red", "part": "colour"},
        {"name": "blue", "part": "colour"},
        {"name": "day", "part": "time"},
        {"name": "night", "part": "time"},
    ],
    "attributes": [
        {"name": "colour", "type": "categorical", "values": ["red", "green", "blue"]},
        {
            "name": "marks",
            "type": "multilabel",
            "values": ["rim", "dots", "stripes"],
            "flip_pairs": [["dots", "stripes"]],
        },
        {"name": "weight", "type": "scalar", "classes": ["figure", "square"]},
    ],
}
"""What labels other than classes speak of. In the maps of classes 255 says that nothing is known of a pixel. A mirror
swaps dots and stripes, for the sake of tests."""

DEPTH_SCALE = 1000
"""Values of the maps of distances per metre; 0 says that nothing is known of a pixel."""

_WORDS = {11: ["red", "day"], 12: ["blue", "night"], 13: ["red", "night"], 14: ["blue", "day"], 15: ["red", "day"]}
_LINES = {
    11: [
        {"polygon": [4, 4, 60, 4, 60, 16, 4, 16], "transcription": "upper"},
        {"polygon": [6, 30, 50, 28, 50, 42, 6, 44], "transcription": "lower"},
    ],
    12: [
        {"polygon": [2, 6, 46, 6, 46, 20, 2, 20], "transcription": "alone"},
        {"polygon": [2, 40, 40, 40, 40, 52, 2, 52], "transcription": "###", "ignore": True},
    ],
    14: [],
}
_WITHOUT_MAPS = (14, 15)
_POINT_FIELDS = ("keypoints", "num_keypoints")


@dataclass(frozen=True)
class Toy:
    """Where a toy dataset lies.

    Attributes:
        root: folder of everything.
        images: folder of the image files.
        boxes: JSON of all annotations without their points.
        points: JSON of the figures' annotations with their points.
    """

    root: Path
    images: Path
    boxes: Path
    points: Path

    def node(self, **overrides: Any) -> dict[str, Any]:
        """The dataset's node in a configuration."""
        return {"name": "toy", "images": "images", "annotations": ["boxes.json", "points.json"], **overrides}


def write_toy(root: Path) -> Toy:
    """Writes the images and both JSON files."""
    toy = Toy(root, root / "images", root / "boxes.json", root / "points.json")
    toy.images.mkdir(parents=True)
    annotations = toy_annotations()
    images = [_image(toy, image_id) for image_id in SIZES]
    for image in images:
        boxes = [a["bbox"] for a in annotations if a["image_id"] == image["id"]]
        _paint(image["height"], image["width"], image["id"], boxes).save(toy.images / image["file_name"])
    plain = [{key: value for key, value in a.items() if key not in _POINT_FIELDS} for a in annotations]
    schemaless = [{key: c[key] for key in ("id", "name", "supercategory")} for c in CATEGORIES]
    write_json(toy.boxes, images, plain, schemaless)
    write_json(toy.points, images, [a for a in annotations if "keypoints" in a], CATEGORIES[:1])
    return toy


def write_json(path: Path, images: list[dict], annotations: list[dict], categories: list[dict]) -> Path:
    """Writes a COCO JSON."""
    content = {"images": images, "annotations": annotations, "categories": categories, "vocabularies": VOCABULARIES}
    path.write_text(json.dumps(content))
    return path


def toy_annotations() -> list[dict[str, Any]]:
    """All annotations, with the dataset's own category ids."""
    return [
        _annotation(101, 11, 2, [8, 6, 20, 30], _polygon(8, 6, 20, 30), [18, 8, 2, 10, 20, 2, 26, 20, 1])
        | {"attributes": {"colour": "red", "marks": ["rim", "dots"], "weight": 3.5}},
        _annotation(102, 11, 5, [34, 10, 24, 20], _polygon(34, 10, 10, 20) + _polygon(46, 12, 12, 16))
        | {"attributes": {"colour": "green", "marks": []}},
        _annotation(103, 12, 2, [4, 10, 24, 40], _rle(12, [4, 10, 24, 40]), [16, 12, 2, 6, 30, 1, 26, 30, 2]),
        _annotation(104, 12, 9, [30, 40, 12, 14]) | {"attributes": {"colour": "blue", "weight": 1.25}},
        _annotation(105, 13, 5, [40, 4, 36, 30], _rle(13, [40, 4, 36, 30]), crowd=1),
        _annotation(106, 13, 5, [6, 8, 18, 18], _polygon(6, 8, 18, 18)),
        _annotation(107, 15, 2, [4, 4, 20, 40], _polygon(4, 4, 20, 40), [0] * 9),
        _annotation(108, 15, 9, [26, 10, 14, 14], _polygon(26, 10, 14, 14)),
        _annotation(109, 15, 9, [20, 50, 16, 16], _polygon(20, 50, 16, 16)) | {"attributes": {"marks": ["stripes"]}},
        _annotation(110, 16, 2, [38, 2, 22, 32], _polygon(38, 2, 22, 32), [50, 4, 2, 40, 16, 2, 59.5, 16, 1]),
    ]


def _image(toy: Toy, image_id: int) -> dict[str, Any]:
    """The entry of an image, with its labels; writes its maps."""
    height, width = SIZES[image_id]
    image: dict[str, Any] = {"id": image_id, "file_name": f"{image_id}.png", "height": height, "width": width}
    if image_id in _WORDS:
        image["image_labels"] = _WORDS[image_id]
    if image_id in _LINES:
        image["text_lines"] = _LINES[image_id]
    if image_id not in _WITHOUT_MAPS:
        classes, distances = _maps(image_id)
        image |= {"sem_seg_file_name": f"../classes/{image_id}.png", "depth_scale": DEPTH_SCALE}
        image["depth_file_name"] = f"../distances/{image_id}.png"
        for folder, values in (("classes", classes), ("distances", distances)):
            (toy.root / folder).mkdir(exist_ok=True)
            Image.fromarray(values).save(toy.root / folder / f"{image_id}.png")
    return image


def _maps(image_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(H, W) uint8 class ids with 255 for unknown, and (H, W) uint16 millimetres with 0 for unknown."""
    height, width = SIZES[image_id]
    classes = np.zeros((height, width), np.uint8)
    distances = np.linspace(6000, 2000, height)[:, None].repeat(width, axis=1).astype(np.uint16)
    for annotation in toy_annotations():
        if annotation["image_id"] == image_id:
            x, y, w, h = annotation["bbox"]
            classes[y : y + h, x : x + w] = 4
            classes[y + 2 : y + h - 2, x + 2 : x + w - 2] = 1
            distances[y : y + h, x : x + w] = 1500
    classes[:3, -5:] = 255
    distances[-3:, :5] = 0
    return classes, distances


def _annotation(
    number: int,
    image: int,
    category: int,
    box: list[float],
    segmentation: Any = None,
    points: list[float] | None = None,
    crowd: int = 0,
) -> dict[str, Any]:
    annotation = {
        "id": number,
        "image_id": image,
        "category_id": category,
        "bbox": box,
        "area": box[2] * box[3],
        "iscrowd": crowd,
    }
    if segmentation is not None:
        annotation["segmentation"] = segmentation
    if points is not None:
        annotation["keypoints"] = points
        annotation["num_keypoints"] = sum(v > 0 for v in points[2::3])
    return annotation


def _polygon(x: float, y: float, w: float, h: float) -> list[list[float]]:
    return [[x, y, x + w, y, x + w, y + h, x, y + h]]


def _rle(image: int, box: list[int]) -> dict[str, Any]:
    mask = np.zeros(SIZES[image], dtype=np.uint8, order="F")
    x, y, w, h = box
    mask[y : y + h, x : x + w] = 1
    encoded = coco_mask.encode(mask)
    return {"size": encoded["size"], "counts": encoded["counts"].decode("ascii")}


def _paint(height: int, width: int, seed: int, boxes: list[list[float]]) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 120, size=(height, width, 3), dtype=np.uint8)
    picture = Image.fromarray(noise)
    for number, (x, y, w, h) in enumerate(boxes):
        colour = [(230, 40, 40), (40, 230, 40), (40, 40, 230)][number % 3]
        ImageDraw.Draw(picture).rectangle((x, y, x + w - 1, y + h - 1), fill=colour)
    return picture
