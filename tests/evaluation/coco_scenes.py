"""Seeded random COCO ground truth and jittered detections, for comparing scorers."""

from __future__ import annotations

from typing import Any

import numpy as np
from pycocotools import mask as mask_api


def random_truth(rng: np.random.Generator, *, images: int = 12, classes: int = 3, keypoints: int = 5) -> dict[str, Any]:
    """COCO dict with polygons, list RLEs, crowds, unlabelled keypoints and, on average, a fifth of the images empty."""
    sizes = [(int(rng.integers(90, 300)), int(rng.integers(90, 300))) for _ in range(images)]
    truth = {
        "images": [{"id": 7 + 3 * i, "height": h, "width": w} for i, (h, w) in enumerate(sizes)],
        "categories": [{"id": 2 + 5 * k, "name": f"class{k}"} for k in range(classes)],
        "annotations": [],
    }
    for image in truth["images"]:
        for _ in range(0 if rng.random() < 0.2 else int(rng.integers(1, 7))):
            annotation = random_annotation(rng, image, keypoints)
            annotation["category_id"] = truth["categories"][int(rng.integers(classes))]["id"]
            truth["annotations"].append({"id": len(truth["annotations"]) + 1, "image_id": image["id"], **annotation})
    return truth


def random_annotation(rng: np.random.Generator, image: dict[str, Any], keypoints: int) -> dict[str, Any]:
    """Box, octagon and keypoints inside the image; one in six is a crowd with an uncompressed RLE."""
    x, y, w, h = random_box(rng, image)
    polygon = octagon(x, y, w, h)
    crowd = rng.random() < 1 / 6
    visible = rng.integers(0, 3, keypoints) * (rng.random() > 0.2)
    points = np.stack([x + rng.random(keypoints) * w, y + rng.random(keypoints) * h, visible], axis=1)
    points[visible == 0] = 0
    return {
        "bbox": [x, y, w, h],
        "area": float(w * h * rng.uniform(0.5, 1.0)),
        "iscrowd": int(crowd),
        "segmentation": list_rle(polygon, image) if crowd else [polygon],
        "keypoints": points.round(2).reshape(-1).tolist(),
        "num_keypoints": int((visible > 0).sum()),
    }


def random_box(rng: np.random.Generator, image: dict[str, Any]) -> list[float]:
    w, h = rng.uniform(8, image["width"] * 0.7), rng.uniform(8, image["height"] * 0.7)
    x, y = rng.uniform(0, image["width"] - w), rng.uniform(0, image["height"] - h)
    return [round(float(value), 2) for value in (x, y, w, h)]


def octagon(x: float, y: float, w: float, h: float) -> list[float]:
    """Flat x, y list of a box with cut corners."""
    steps = [(0.3, 0), (0.7, 0), (1, 0.3), (1, 0.7), (0.7, 1), (0.3, 1), (0, 0.7), (0, 0.3)]
    return [round(value, 2) for u, v in steps for value in (x + u * w, y + v * h)]


def list_rle(polygon: list[float], image: dict[str, Any]) -> dict[str, Any]:
    """Uncompressed COCO RLE: run lengths down the columns, starting with zeros."""
    flat = mask_api.decode(mask_api.frPyObjects([polygon], image["height"], image["width"]))[:, :, 0].T.reshape(-1)
    edges = np.flatnonzero(np.diff(flat)) + 1
    runs = np.diff(np.concatenate([[0], edges, [flat.size]])).tolist()
    return {"size": [image["height"], image["width"]], "counts": ([0] if flat[0] else []) + runs}


def jittered_rows(rng: np.random.Generator, truth: dict[str, Any], iou_type: str) -> list[dict[str, Any]]:
    """Detections near the ground truth, some twice, some missing, some elsewhere; scores in steps of 0.05: ties."""
    sizes = {image["id"]: image for image in truth["images"]}
    rows = []
    for annotation in truth["annotations"]:
        for _ in range(int(rng.choice([0, 1, 1, 1, 2]))):
            row = {"image_id": annotation["image_id"], "category_id": annotation["category_id"]}
            row["score"] = round(float(rng.integers(1, 20)) / 20, 2)
            rows.append({**row, **_geometry(rng, annotation, sizes[annotation["image_id"]], iou_type)})
    for _ in range(10):
        image = truth["images"][int(rng.integers(len(truth["images"])))]
        like = truth["annotations"][int(rng.integers(len(truth["annotations"])))]
        row = {"image_id": image["id"], "category_id": like["category_id"], "score": round(float(rng.random()), 3)}
        rows.append({**row, **_geometry(rng, {**like, "bbox": random_box(rng, image)}, image, iou_type)})
    return rows


def _geometry(rng: np.random.Generator, like: dict[str, Any], image: dict[str, Any], iou_type: str) -> dict[str, Any]:
    x, y, w, h = like["bbox"]
    spread = float(rng.choice([0.01, 0.05, 0.15]))
    x, y = x + rng.normal(0, spread) * w, y + rng.normal(0, spread) * h
    w, h = w * np.exp(rng.normal(0, spread)), h * np.exp(rng.normal(0, spread))
    if iou_type == "bbox":
        return {"bbox": [float(x), float(y), float(w), float(h)]}
    if iou_type == "segm":
        polygon = octagon(float(x), float(y), float(w), float(h))
        rle = mask_api.merge(mask_api.frPyObjects([polygon], image["height"], image["width"]))
        return {"segmentation": {"size": [image["height"], image["width"]], "counts": rle["counts"].decode("ascii")}}
    points = np.array(like["keypoints"], dtype=float).reshape(-1, 3)
    inside = np.stack([x + rng.random(len(points)) * w, y + rng.random(len(points)) * h], axis=1)
    moved = np.where(points[:, 2:] > 0, points[:, :2] + rng.normal(0, spread, (len(points), 2)) * w, inside)
    scores = rng.random((len(points), 1))
    return {"keypoints": np.concatenate([moved, scores], axis=1).reshape(-1).tolist()}


def records_of(truth: dict[str, Any], dataset: str = "random") -> tuple[list[dict[str, Any]], list[str]]:
    """(records, class names) as the data part makes them: contiguous classes in the order of the category ids."""
    categories = sorted(truth["categories"], key=lambda category: category["id"])
    class_of = {category["id"]: index for index, category in enumerate(categories)}
    records = [
        {
            "file_name": f"{image['id']}.jpg",
            "height": image["height"],
            "width": image["width"],
            "image_id": image["id"],
            "dataset": dataset,
            "tasks": None,
            "classes": tuple(range(len(categories))),
            "category_ids": tuple(category["id"] for category in categories),
            "annotations": [
                {**annotation, "category_id": class_of[annotation["category_id"]]}
                for annotation in truth["annotations"]
                if annotation["image_id"] == image["id"]
            ],
        }
        for image in truth["images"]
    ]
    return records, [category["name"] for category in categories]
