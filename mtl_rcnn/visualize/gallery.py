"""Drawings put together: one image with all its tasks, truth beside prediction, many on one sheet, a file."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import cv2
import numpy as np

from mtl_rcnn.data.target import Prediction, Target
from mtl_rcnn.errors import MtlRcnnError
from mtl_rcnn.visualize.canvas import Canvas

_GAP = 6
_GROUND = 245
"""Grey of gaps and title bars."""

_WIDE = 2.5
"""Width by height of a drawing that has no room beside another."""


def draw_prediction(
    image: np.ndarray,
    prediction: Prediction,
    targets: Iterable[Target],
    class_names: Sequence[str] = (),
    *,
    caption: str = "",
    scale: float | None = None,
) -> np.ndarray:
    """(H', W', 3) uint8 RGB with what each target draws of the prediction, in their order: later ones lie on top.

    Targets that cover the picture (`Target.covers`) have panels of their own to its right, the last one first.

    Args:
        image: (H, W, 3) uint8 RGB; the prediction is in its frame.
        prediction: of a network, or `Target.as_prediction` of a sample.
        caption: text in the upper left corner.
        scale: see `Canvas`.
    """
    panels = []
    for layers in _panels(list(targets)):
        canvas = Canvas(image, class_names, scale)
        for target in layers:
            target.draw(canvas, prediction)
        if caption and not panels:
            canvas.caption(caption)
        panels.append(canvas.image)
    return panels[0] if len(panels) == 1 else _row(panels, [panel.shape[1] for panel in panels])[:-_GAP]


def _panels(targets: list[Target]) -> list[list[Target]]:
    """Which targets share a panel: all that leave the picture visible, then each of the others."""
    over = [target for target in targets if not target.covers]
    own = [[target] for target in targets[::-1] if target.covers]
    return [over, *own] if over or not own else own


def drawing_order(targets: Mapping[str, Target]) -> list[Target]:
    """Targets in the order in which `draw_prediction` takes them: areas below, boxes with their labels on top."""
    return list(targets.values())[::-1]


def side_by_side(
    truth: np.ndarray, prediction: np.ndarray, titles: tuple[str, str] = ("ground truth", "prediction")
) -> np.ndarray:
    """Two (H, W, 3) RGB drawings of one size, each under its title, in one row; wide ones below each other."""
    return contact_sheet([truth, prediction], columns=1 if is_wide(truth) else 2, titles=titles)


def is_wide(image: np.ndarray) -> bool:
    """Whether an (H, W, 3) drawing takes a row of its own, as one of several panels does."""
    return image.shape[1] > _WIDE * image.shape[0]


def contact_sheet(images: Sequence[np.ndarray], columns: int, titles: Sequence[str] | None = None) -> np.ndarray:
    """(H, W, 3) RGB: drawings in rows of `columns`, each row as high and each column as wide as its largest.

    Raises:
        ValueError: no images, or another number of titles.
    """
    if not images or columns < 1:
        raise ValueError(f"expected at least one image and one column, got {len(images)} and {columns}")
    if titles is not None and len(titles) != len(images):
        raise ValueError(f"{len(images)} images, but {len(titles)} titles")
    tiles = images if titles is None else [_titled(image, title) for image, title in zip(images, titles, strict=True)]
    rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
    widths = [max(tile.shape[1] for tile in tiles[column::columns]) for column in range(min(columns, len(tiles)))]
    return np.concatenate([_row(row, widths) for row in rows], axis=0)


def write_image(path: Path | str, rgb: np.ndarray) -> Path:
    """Writes (H, W, 3) uint8 RGB as PNG or JPEG, by the name's ending; creates the folder.

    Raises:
        MtlRcnnError: the ending is not .png, .jpg or .jpeg, or the file cannot be written; names it.
    """
    path = Path(path)
    if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
        raise MtlRcnnError(
            f"{path}: images are written as .png, .jpg or .jpeg, not as {path.suffix or 'a file without ending'}"
        )
    done, data = cv2.imencode(path.suffix.lower(), cv2.cvtColor(rgb, cv2.COLOR_RGB2BGR))
    if not done:
        raise MtlRcnnError(f"{path}: an image of shape {rgb.shape} cannot be encoded")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data.tobytes())
    except OSError as error:
        raise MtlRcnnError(f"{path}: cannot be written: {error.strerror or error}") from error
    return path


def _titled(image: np.ndarray, title: str) -> np.ndarray:
    """The image under a bar with the title, which shrinks to the image's width."""
    height, width = 26, image.shape[1]
    bar = np.full((height, width, 3), _GROUND, dtype=np.uint8)
    (wide, _), _ = cv2.getTextSize(title, cv2.FONT_HERSHEY_SIMPLEX, 0.5, 1)
    scale = 0.5 * min(1.0, max(width - 8, 1) / max(wide, 1))
    cv2.putText(bar, title, (4, height - 9), cv2.FONT_HERSHEY_SIMPLEX, scale, (20, 20, 20), 1, cv2.LINE_AA)
    return np.concatenate([bar, image], axis=0)


def _row(tiles: Sequence[np.ndarray], widths: Sequence[int]) -> np.ndarray:
    height = max(tile.shape[0] for tile in tiles) + _GAP
    row = np.full((height, sum(widths) + _GAP * (len(widths) - 1), 3), _GROUND, dtype=np.uint8)
    left = 0
    for tile, width in zip(tiles, widths):
        row[: tile.shape[0], left : left + tile.shape[1]] = tile
        left += width + _GAP
    return row
