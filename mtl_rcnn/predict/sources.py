"""What there is to predict on: an image, a folder, a pattern, a video, an address, or many of these, as one stream.

Files are found at once, and opened only when their turn comes: a stream of a million images is a list of names.
"""

from __future__ import annotations

import glob
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import cv2
import numpy as np
from PIL import Image

from mtl_rcnn.data.image_file import IMAGE_SUFFIXES, read_rgb, upright_rgb
from mtl_rcnn.errors import DataError, UnreadableImageError
from mtl_rcnn.predict.downloads import is_url, read_url, url_name

logger = logging.getLogger(__name__)

VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg", ".wmv")
_PATTERN = "*?["


@dataclass(frozen=True)
class Item:
    """One image of a stream.

    Attributes:
        name: what results call it.
        read: its pixels, (H, W, 3) uint8 RGB; raises DataError. Threads may call it.
        path: the image's or the video's file, None for an image in memory or by its address.
        frame: number of the frame in its video, from 0; None for an image.
    """

    name: str
    read: Callable[[], np.ndarray]
    path: Path | None = None
    frame: int | None = None


@dataclass(frozen=True)
class Source:
    """A stream of images.

    Attributes:
        items: each once, in order.
        total: how many, None if nobody knows.
    """

    items: Iterator[Item]
    total: int | None


def open_source(source: Any, channel_order: str = "RGB") -> Source:
    """The images of a source.

    Args:
        source: a path to an image, a video or a folder (its image files, by name), a pattern such as
            "frames/**/*.jpg", or the http(s) address of an image; an image as Pillow image or (H, W, 3) uint8 array;
            or any iterable of these.
        channel_order: of arrays, "RGB", or "BGR" as OpenCV's.

    Raises:
        DataError: a path at which there is nothing, a folder or pattern without images. A file that cannot be read, or
            a missing one of a sequence, raises only when it is read; entries of an iterable are opened in their turn.
    """
    if isinstance(source, str) and is_url(source):
        return _of_url(source)
    if isinstance(source, str | os.PathLike):
        return _open_path(os.fspath(source))
    if isinstance(source, np.ndarray | Image.Image):
        return Source(iter([_in_memory(source, "image", channel_order)]), 1)
    if isinstance(source, Sequence):
        parts = [_member(entry, index, channel_order) for index, entry in enumerate(source)]
        totals = [part.total for part in parts]
        return Source(chain.from_iterable(part.items for part in parts), None if None in totals else sum(totals))
    if isinstance(source, Iterable):
        return Source(_of_iterable(source, channel_order), None)
    raise DataError(
        f"cannot predict on {type(source).__name__}: expected a path, an address, a Pillow image, an (H, W, 3) "
        "uint8 array, or an iterable of these"
    )


def is_video(path: Path) -> bool:
    """Whether the name's ending is that of a video."""
    return path.suffix.lower() in VIDEO_SUFFIXES


def frame_rate(path: Path) -> float:
    """Frames per second that a video announces; 25 if it announces none."""
    capture = cv2.VideoCapture(str(path))
    rate = capture.get(cv2.CAP_PROP_FPS)
    capture.release()
    return rate if 0 < rate < 1000 else 25.0


def _open_path(text: str) -> Source:
    path = Path(text)
    if path.is_dir():
        found = sorted(file for file in path.iterdir() if file.suffix.lower() in IMAGE_SUFFIXES)
        if not found:
            raise DataError(f"{path}: the folder holds no image ({', '.join(IMAGE_SUFFIXES)})")
        return _of_files(found, path)
    if path.exists():
        return _of_files([path], path.parent)
    if any(character in text for character in _PATTERN):
        found = [Path(match) for match in sorted(glob.glob(text, recursive=True))]
        known = [file for file in found if file.suffix.lower() in IMAGE_SUFFIXES or is_video(file)]
        if not known:
            raise DataError(f"{text}: no image or video matches this pattern ({len(found)} other files do)")
        return _of_files(known, _fixed_part(path))
    raise DataError(
        f"{text}: does not exist; expected an image, a video, a folder of images, a pattern (*, ?, []), or http(s)://..."
    )


def _member(entry: Any, index: int, channel_order: str) -> Source:
    """A part of a sequence: files bear the names by which they are given, and are looked for when they are read."""
    if isinstance(entry, str) and is_url(entry):
        return _of_url(entry)
    if isinstance(entry, str | os.PathLike):
        path = Path(entry)
        if not path.is_dir() and not any(character in str(path) for character in _PATTERN):
            return _of_files([path], None)
        return open_source(entry)
    if isinstance(entry, np.ndarray | Image.Image):
        return Source(iter([_in_memory(entry, f"image {index}", channel_order)]), 1)
    return open_source(entry, channel_order)


def _of_iterable(entries: Iterable[Any], channel_order: str) -> Iterator[Item]:
    for index, entry in enumerate(entries):
        yield from _member(entry, index, channel_order).items


def _of_url(url: str) -> Source:
    if is_video(Path(urlsplit(url).path)):
        raise DataError(f"{url}: a video is not read from an address; download it first")
    return Source(iter([Item(url_name(url), partial(read_url, url))]), 1)


def _of_files(paths: Sequence[Path], root: Path | None) -> Source:
    def items() -> Iterator[Item]:
        for path in paths:
            name = path.as_posix() if root is None else path.relative_to(root).as_posix()
            if is_video(path):
                yield from _frames(path, name)
            else:
                yield Item(name, partial(read_rgb, path), path)

    return Source(items(), sum(_announced_frames(path) if is_video(path) else 1 for path in paths))


def _in_memory(image: Any, name: str, channel_order: str) -> Item:
    if isinstance(image, Image.Image):
        return Item(name, partial(upright_rgb, image))
    if image.ndim != 3 or image.shape[2] != 3 or image.dtype != np.uint8 or 0 in image.shape:
        raise DataError(f"{name}: expected an array (H, W, 3) of uint8, got {image.shape} of {image.dtype}")
    return Item(name, lambda: np.ascontiguousarray(image[:, :, ::-1]) if channel_order == "BGR" else image)


def _fixed_part(pattern: Path) -> Path:
    """The folders of a pattern before its first wildcard."""
    parts = pattern.parts
    first = next(index for index, part in enumerate(parts) if any(character in part for character in _PATTERN))
    return Path(*parts[:first])


def _announced_frames(path: Path) -> int:
    """The length that a video announces, which may differ from what can be decoded; 1 for one that is broken."""
    capture = cv2.VideoCapture(str(path))
    number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)) if capture.isOpened() else 1
    capture.release()
    return max(number, 0)


def _frames(path: Path, name: str) -> Iterator[Item]:
    """A video's frames in order, named `name#number`, turned upright as the file says; one that cannot be opened gives
    one item that cannot be read."""
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        yield Item(name, partial(_broken_video, path), path)
        return
    announced, number = int(capture.get(cv2.CAP_PROP_FRAME_COUNT)), 0
    try:
        while (decoded := capture.read())[0]:
            yield Item(f"{name}#{number}", partial(cv2.cvtColor, decoded[1], cv2.COLOR_BGR2RGB), path, number)
            number += 1
    finally:
        capture.release()
    if number < announced:
        logger.warning("%s: announces %d frames, %d can be decoded", path, announced, number)


def _broken_video(path: Path) -> np.ndarray:
    raise UnreadableImageError(f"{path}: {'the video cannot be decoded' if path.is_file() else 'no such video file'}")
