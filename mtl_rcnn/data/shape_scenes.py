"""Writes the Shape Scenes data set: painted scenes as PNG files with labels that are exact to the pixel.

    python datasets/shape_scenes.py --out data/shape_scenes --train 400 --val 100 --seed 0 --size 192x128

Layout and conventions: `datasets/README.md`. What a scene is: `shape_painter`; its objects: `shape_sprites`; their
classes: `shape_classes`; what is said of them: `shape_labels`. NumPy, OpenCV and Pillow are all that is needed.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from mtl_rcnn.data.shape_labels import (
    SHAPE_CATEGORIES,
    annotations_of,
    class_map,
    distance_map,
    image_of,
    vocabularies,
)
from mtl_rcnn.data.shape_painter import FLAVOURS, SPLITS, sample_scene
from mtl_rcnn.errors import DataError

__all__ = ["main", "parse_size", "sample_scene", "write_shape_scenes"]

VERSION = 2  # of the pictures and labels: to be raised whenever the same parameters give other files
STAMP = "shape_scenes.json"
_SMALLEST_SIDE = 64
_LEAST_ASPECT = 1.1
_REPORT_SECONDS = 5.0


def write_shape_scenes(
    out: str | Path,
    train: int = 400,
    val: int = 100,
    seed: int = 0,
    size: tuple[int, int] = (192, 128),
    progress: bool = True,
    flavour: str = "plain",
) -> Path:
    """Write the data set to folder `out`, or return at once if it is there already with the same parameters.

    The folder appears complete or not at all, also when the process is killed or several write it at the same time
    (a killed one leaves a hidden folder `.<name>-*` beside it, which may be deleted).

    Args:
        out: folder to make; it may exist if it is empty.
        train: number of training scenes.
        val: number of validation scenes, drawn independently of the training scenes.
        seed: scene n of a split depends on (seed, split, n, size, flavour) only; more scenes change no earlier one.
        size: nominal (width, height) in pixels; single scenes vary around it.
        progress: report progress on standard error.
        flavour: "plain", "full" (haze and distances, lines of text) or "lettered" (many lines of text, few objects).

    Raises:
        DataError: a parameter is out of range, or the folder holds something else.
    """
    stamp = _stamp(train, val, seed, size, flavour)
    out = Path(out)
    if _already_written(out, stamp):
        return out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}-", dir=out.parent) as scratch:
        build = Path(scratch) / "build"
        (build / "annotations").mkdir(parents=True)
        for split, count in zip(SPLITS, (train, val), strict=True):
            _write_split(build, split, count, stamp, progress)
        (build / STAMP).write_text(json.dumps(stamp, indent=1) + "\n")
        try:
            build.rename(out)
        except OSError:  # someone else was faster; fine if it is the same data set
            if not _already_written(out, stamp):
                raise
    return out


def parse_size(text: str) -> tuple[int, int]:
    """'192x128' -> (192, 128), width first. Raises DataError with the expected form."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdecimal() and height.isdecimal()):
        raise DataError(f"size {text!r}: expected WIDTHxHEIGHT in pixels, such as 192x128")
    return int(width), int(height)


def main(argv: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(description="Generate the Shape Scenes data set (COCO layout).")
    parser.add_argument("--out", required=True, type=Path, help="folder to make")
    parser.add_argument("--train", type=int, default=400, help="training scenes (default: %(default)s)")
    parser.add_argument("--val", type=int, default=100, help="validation scenes (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="default: %(default)s")
    parser.add_argument("--size", default="192x128", help="nominal width x height in pixels (default: %(default)s)")
    parser.add_argument("--flavour", choices=FLAVOURS, default="plain", help="kind of scenes (default: %(default)s)")
    args = parser.parse_args(argv)
    try:
        size = parse_size(args.size)
        out = write_shape_scenes(args.out, args.train, args.val, args.seed, size, flavour=args.flavour)
    except (DataError, OSError) as error:
        print(f"shape_scenes: error: {error}", file=sys.stderr)
        return 2
    print(f"{out}: {args.train} training and {args.val} validation scenes")
    return 0


# ---------------------------------------------------------------------------------------------------------------------
# The stamp: which parameters a folder was written with


def _stamp(train: int, val: int, seed: int, size: tuple[int, int], flavour: str) -> dict[str, Any]:
    for name, value in (("train", train), ("val", val), ("seed", seed)):
        if value < 0:
            raise DataError(f"{name}={value}: expected a number of at least 0")
    if flavour not in FLAVOURS:
        raise DataError(f"flavour {flavour!r}: expected one of {', '.join(FLAVOURS)}")
    width, height = size
    if min(size) < _SMALLEST_SIDE:
        raise DataError(f"size {width}x{height}: expected sides of at least {_SMALLEST_SIDE} pixels, such as 192x128")
    if max(size) < _LEAST_ASPECT * min(size):
        raise DataError(
            f"size {width}x{height}: expected sides that differ by at least 10 %, such as 192x128, "
            "because square images would hide exchanged widths and heights"
        )
    return {"version": VERSION, "train": train, "val": val, "seed": seed, "size": [width, height], "flavour": flavour}


def _already_written(out: Path, stamp: dict[str, Any]) -> bool:
    """Whether `out` holds this data set; False if it is missing or empty, DataError if it holds anything else."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return False
    found = _read_stamp(out / STAMP)
    if found == stamp:
        return True
    what = f"Shape Scenes written with {json.dumps(found)}" if found else f"no Shape Scenes (no readable {STAMP})"
    raise DataError(
        f"{out} holds {what}, but {json.dumps(stamp)} was asked for: choose another folder, or delete this one first"
    )


def _read_stamp(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------------------------
# One split: pictures, maps and annotations


def _write_split(root: Path, split: str, count: int, stamp: dict[str, Any], progress: bool) -> None:
    images: list[dict] = []
    annotations: list[dict] = []
    seed, flavour = stamp["seed"], stamp["flavour"]
    for folder in (split, f"semantic_{split}", *([f"depth_{split}"] if FLAVOURS[flavour].hazy else [])):
        (root / folder).mkdir()
    for index in _report(count, f"shape_scenes {split}") if progress else range(count):
        scene = sample_scene(seed, split, index, tuple(stamp["size"]), flavour)
        image = image_of(scene, index + 1, split)
        _write_png(root / split / image["file_name"], cv2.cvtColor(scene.image, cv2.COLOR_RGB2BGR))
        _write_png(root / split / image["sem_seg_file_name"], class_map(scene))
        distances = distance_map(scene)
        if distances is not None:
            _write_png(root / split / image["depth_file_name"], distances)
        images.append(image)
        annotations += annotations_of(scene, image["id"], first_id=len(annotations) + 1)
    info = {"description": f"Shape Scenes, {flavour}, {split}", "version": str(VERSION)}
    coco = {"info": info, "licenses": [], "images": images, "annotations": annotations, "categories": SHAPE_CATEGORIES}
    coco["vocabularies"] = vocabularies(flavour)
    (root / "annotations" / f"instances_{split}.json").write_text(json.dumps(coco))


def _write_png(path: Path, image: np.ndarray) -> None:
    encoded, data = cv2.imencode(".png", image)  # fast by default
    if not encoded:
        raise OSError(f"{path}: OpenCV could not encode the picture")
    path.write_bytes(data.tobytes())


# ---------------------------------------------------------------------------------------------------------------------
# Progress


def _report(count: int, label: str) -> Iterator[int]:
    """Count from 0 to `count`, with a bar on a terminal and otherwise with a line every few seconds."""
    if sys.stderr.isatty():
        from rich.console import Console
        from rich.progress import track

        yield from track(range(count), label, console=Console(stderr=True))
        return
    start = last = time.monotonic()
    for index in range(count):
        yield index
        now = time.monotonic()
        if now - last >= _REPORT_SECONDS or index + 1 == count:
            last, rate = now, (index + 1) / max(now - start, 1e-9)
            left = (count - index - 1) / rate
            print(f"{label} {index + 1}/{count}  {rate:.0f} images/s  {left:.0f} s left", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
