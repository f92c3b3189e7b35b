"""Faults to plant in the toy data set and in a copy of COCO files, with what a check of the data must find."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from toy import Toy

Found = tuple[str, str, Any, Any]
"""Kind, name of the file, image id, annotation id."""


@dataclass(frozen=True)
class Plant:
    """A fault to plant.

    Attributes:
        spoil: changes the contents of both JSON files (boxes, points), or the folder of images.
        found: what must be found.
    """

    spoil: Callable[[dict, dict, Path], Any]
    found: tuple[Found, ...]


def box(number: int, **fields: Any) -> Callable[[dict, dict, Path], Any]:
    """Changes an annotation of boxes.json."""
    return lambda boxes, points, images: _entry(boxes, number).update(fields)


def point(number: int, **fields: Any) -> Callable[[dict, dict, Path], Any]:
    """Changes an annotation of points.json."""
    return lambda boxes, points, images: _entry(points, number).update(fields)


def _entry(content: dict, number: int) -> dict:
    return next(entry for entry in content["annotations"] if entry["id"] == number)


def _both(number: int, **fields: Any) -> Callable[[dict, dict, Path], Any]:
    def spoil(boxes: dict, points: dict, images: Path) -> None:
        for content in (boxes, points):
            _entry(content, number).update(fields)

    return spoil


def _image(content: dict, number: int) -> dict:
    return next(entry for entry in content["images"] if entry["id"] == number)


def _resize(boxes: dict, points: dict, images: Path) -> None:
    for content in (boxes, points):
        _image(content, 14).update(width=71)


def _directory(boxes: dict, points: dict, images: Path) -> None:
    (images / "14.png").unlink()
    (images / "14.png").mkdir()


def _write(name: str, change: Callable[[bytes], bytes]) -> Callable[[dict, dict, Path], Any]:
    return lambda boxes, points, images: (images / name).write_bytes(change((images / name).read_bytes()))


PLANTS = {
    "image missing": Plant(
        lambda b, p, images: (images / "14.png").unlink(), (("image file missing", "14.png", 14, None),)
    ),
    "image truncated": Plant(_write("12.png", lambda d: d[: len(d) // 2]), (("damaged image", "12.png", 12, None),)),
    "image of zero bytes": Plant(_write("13.png", lambda d: b""), (("empty image file", "13.png", 13, None),)),
    "image of text": Plant(_write("13.png", lambda d: b"<html>"), (("damaged image", "13.png", 13, None),)),
    "directory for image": Plant(_directory, (("folder in place of an image", "14.png", 14, None),)),
    "size of another image": Plant(_resize, (("image of another size", "14.png", 14, None),)),
    "image id twice": Plant(
        lambda b, p, i: b["images"].append({**b["images"][0]}), (("duplicate image id", "boxes.json", 11, None),)
    ),
    "annotation id twice": Plant(
        lambda b, p, i: b["annotations"].append({**_entry(b, 108)}),
        (("duplicate annotation id", "boxes.json", 15, 108),),
    ),
    "annotation id of two": Plant(
        lambda b, p, i: b["annotations"].append({**_entry(b, 108), "bbox": [1, 2, 3, 4], "segmentation": []}),
        (("duplicate annotation id", "boxes.json", 15, 108),),
    ),
    "unknown image": Plant(box(104, image_id=99), (("annotation of an unknown image", "boxes.json", 99, 104),)),
    "unknown category": Plant(
        box(104, category_id=77), (("annotation of an unknown category", "boxes.json", 12, 104),)
    ),
    "annotation without category": Plant(
        lambda b, p, i: _entry(b, 104).pop("category_id"),
        (("annotation without category_id", "boxes.json", 12, 104),),
    ),
    "image without height": Plant(
        lambda b, p, i: _image(b, 14).pop("height"), (("image without height", "boxes.json", 14, None),)
    ),
    "image of no width": Plant(
        lambda b, p, i: _image(b, 14).update(width=0), (("image size", "boxes.json", 14, None),)
    ),
    "NaN box": Plant(
        box(106, bbox=[1.0, float("nan"), 3.0, 4.0]), (("malformed box", "boxes.json", 13, 106),)
    ),
    "box of corners": Plant(box(106, bbox=[30, 20, -10, 5]), (("negative box", "boxes.json", 13, 106),)),
    "box without area": Plant(box(109, bbox=[20, 50, 0, 16]), (("empty box", "boxes.json", 15, 109),)),
    "box half outside": Plant(
        box(108, bbox=[36, 10, 24, 14]), (("box outside the image", "boxes.json", 15, 108),)
    ),
    "box far outside": Plant(
        box(108, bbox=[400, 10, 24, 14]), (("box outside the image", "boxes.json", 15, 108),)
    ),
    "no box": Plant(lambda b, p, i: _entry(b, 109).pop("bbox"), (("no box", "boxes.json", 15, 109),)),
    "crowd of three": Plant(box(109, iscrowd=3), (("iscrowd", "boxes.json", 15, 109),)),
    "polygon of two points": Plant(
        box(102, segmentation=[[1, 1, 9, 9], [34, 10, 44, 10, 44, 30]]),
        (("malformed polygon", "boxes.json", 11, 102),),
    ),
    "polygon of odd length": Plant(
        box(102, segmentation=[[1, 1, 9, 9, 5, 5, 7]]), (("malformed polygon", "boxes.json", 11, 102),)
    ),
    "crowd's mask of another size": Plant(
        box(105, segmentation={"size": [50, 70], "counts": [3500]}),
        (("mask of another size", "boxes.json", 13, 105),),
    ),
    "run lengths that end early": Plant(
        box(105, segmentation={"size": [40, 80], "counts": [100, 100]}),
        (("malformed run lengths", "boxes.json", 13, 105),),
    ),
    "compressed run lengths cut short": Plant(
        lambda b, p, i: _entry(b, 105)["segmentation"].update(counts=_entry(b, 105)["segmentation"]["counts"][:-3]),
        (("malformed run lengths", "boxes.json", 13, 105),),
    ),
    "too few keypoints": Plant(
        point(101, keypoints=[18, 8, 2]), (("keypoint array of another length", "points.json", 11, 101),)
    ),
    "visibility of 3": Plant(
        point(101, keypoints=[18, 8, 3, 10, 20, 2, 26, 20, 1]), (("keypoint visibility", "points.json", 11, 101),)
    ),
    "keypoint outside": Plant(
        point(101, keypoints=[18, 8, 2, 10, 200, 2, 26, 20, 1]),
        (("keypoint outside the image", "points.json", 11, 101),),
    ),
    "count of keypoints": Plant(point(110, num_keypoints=1), (("num_keypoints", "points.json", 16, 110),)),
    "infinite keypoint": Plant(
        point(101, keypoints=[18, 8, 2, float("inf"), 200, 2, 26, 20, 1]),
        (("malformed keypoints", "points.json", 11, 101),),
    ),
    "area of a text": Plant(box(109, area="large"), (("area", "boxes.json", 15, 109),)),
    "files that disagree": Plant(
        point(110, bbox=[0, 0, 5, 5]), (("files contradict each other", "points.json", 16, 110),)
    ),
    "two kinds in one annotation": Plant(
        _both(110, bbox=[38, 2, 44, 32], num_keypoints=7),
        (("box outside the image", "boxes.json", 16, 110), ("num_keypoints", "points.json", 16, 110)),
    ),
}  # fmt: skip


def spoilt(toy: Toy, *plants: Plant) -> None:
    """Plants faults."""
    contents = [json.loads(path.read_text()) for path in (toy.boxes, toy.points)]
    for plant in plants:
        plant.spoil(*contents, toy.images)
    for path, content in zip((toy.boxes, toy.points), contents):
        path.write_text(json.dumps(content))


def plant_in_coco(root: Path) -> list[Found]:
    """Fifteen faults in a copy of real COCO files; returns what must be found."""
    train = root / "train2017"
    files = {kind: root / "annotations" / f"{kind}_train2017.json" for kind in ("instances", "person_keypoints")}
    boxes, points = (json.loads(path.read_text()) for path in files.values())
    persons = [entry for entry in points["annotations"] if not entry["iscrowd"] and entry["num_keypoints"] > 5]
    things = [e for e in boxes["annotations"] if not e["iscrowd"] and e["category_id"] != 1]
    images = boxes["images"]
    damaged = images[-5:]
    # Each fault in an image of its own, so that what is left out with one does not hide another.
    of_images = iter({e["image_id"]: e for e in things if e["image_id"] not in [i["id"] for i in damaged]}.values())
    of_persons = iter({e["image_id"]: e for e in persons if e["image_id"] not in [i["id"] for i in damaged]}.values())
    found: list[Found] = []

    def plant(kind: str, file: str, entry: dict, **fields: Any) -> None:
        entry.update(fields)
        found.append((kind, file, entry["image_id"], entry["id"]))

    def damage(kind: str, image: dict, data: bytes | None) -> None:
        (train / image["file_name"]).unlink()
        if data is not None:
            (train / image["file_name"]).write_bytes(data)
        found.append((kind, image["file_name"], image["id"], None))

    whole = (train / damaged[0]["file_name"]).read_bytes()
    damage("damaged image", damaged[0], whole[: len(whole) * 3 // 4])
    damage("empty image file", damaged[1], b"")
    damage("image file missing", damaged[2], None)
    damage("folder in place of an image", damaged[3], None)
    (train / damaged[3]["file_name"]).mkdir()
    damage("image of another size", damaged[4], whole)
    a, b, c, d, e, f = (next(of_images) for _ in range(6))
    plant("malformed box", "instances_train2017.json", a, bbox=[1.0, 2.0, float("nan"), 4.0])
    plant("negative box", "instances_train2017.json", b, bbox=[50, 50, -10, -10])
    plant("box outside the image", "instances_train2017.json", c, bbox=[5000, 10, 20, 20])
    plant("annotation of an unknown category", "instances_train2017.json", d, category_id=1000)
    plant("malformed polygon", "instances_train2017.json", e, segmentation=[[1, 2, 3, 4]])
    plant("mask of another size", "instances_train2017.json", f, segmentation={"size": [7, 7], "counts": [49]})
    boxes["annotations"].append(dict(boxes["annotations"][0]))
    found.append(("duplicate annotation id", "instances_train2017.json", boxes["annotations"][0]["image_id"],
                  boxes["annotations"][0]["id"]))  # fmt: skip
    g, h, i = (next(of_persons) for _ in range(3))
    plant("keypoint array of another length", "person_keypoints_train2017.json", g, keypoints=g["keypoints"][:-3])
    plant("keypoint visibility", "person_keypoints_train2017.json", h, keypoints=[5, 5, 7, *h["keypoints"][3:]],
          num_keypoints=sum(v > 0 for v in [7, *h["keypoints"][5::3]]))  # fmt: skip
    plant("num_keypoints", "person_keypoints_train2017.json", i, num_keypoints=16 - i["num_keypoints"] % 2 * 15)
    for path, content in zip(files.values(), (boxes, points)):
        path.write_text(json.dumps(content))
    return found
