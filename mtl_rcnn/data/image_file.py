"""Image files and images of other libraries as arrays: upright, RGB, and whole or not at all. Safe in threads."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from detectron2.data import detection_utils
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from mtl_rcnn.errors import UnreadableImageError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")
"""Endings, in lower case, of what counts as an image in a folder."""


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Raises:
        UnreadableImageError: the file is missing, truncated or no image; names it.
    """
    try:
        with strict_decoding():
            return detection_utils.read_image(str(path), format="RGB")
    except FileNotFoundError:
        raise UnreadableImageError(f"{path}: no such image file") from None
    except UnidentifiedImageError:
        raise UnreadableImageError(f"{path}: the image cannot be decoded (its format is unknown)") from None
    except Exception as error:  # decoders raise anything on damaged files
        raise UnreadableImageError(f"{path}: the image cannot be decoded ({error})") from error


def upright_rgb(image: Image.Image) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an opened Pillow image, as `read_rgb` gives of its file.

    Raises:
        UnreadableImageError: its file is truncated.
    """
    try:
        with strict_decoding():
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except Exception as error:  # decoders raise anything on damaged files
        name = getattr(image, "filename", "") or "Pillow image"
        raise UnreadableImageError(f"{name}: the image cannot be decoded ({error})") from error


class _Strict:
    """How many blocks are inside `strict_decoding`, and what Pillow was set to before the first."""

    lock = threading.Lock()
    inside = 0
    before = False


@contextmanager
def strict_decoding() -> Iterator[None]:
    """A truncated file is an error, even where some other library has told Pillow to fill it up with grey."""
    with _Strict.lock:
        if _Strict.inside == 0:
            _Strict.before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _Strict.inside += 1
    try:
        yield
    finally:
        with _Strict.lock:
            _Strict.inside -= 1
            if _Strict.inside == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Strict.before
