"""Augmentations: those of Detectron2 by name, and an affine one of our own, built from a configuration node."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

import numpy as np
from detectron2.data import transforms as T
from PIL import Image

from mtl_rcnn.data.catalog import suggest
from mtl_rcnn.errors import ConfigError

_TARGET = "_target_"

NEAREST = "nearest"
"""Fill of `AffineTransform`: what lies outside the old image shows the nearest pixel of its border."""

Fill = float | Sequence[float] | str


class AffineTransform(T.Transform):
    """An affine map of the image plane; the size of the image stays.

    Args:
        matrix: (2, 3) from old to new coordinates (pixels, continuous: a pixel's centre is at half numbers).
        height, width: size of the image in pixels.
        fill: grey value or (R, G, B) of what lies outside the old image, or "nearest": the nearest pixel of its
            border. Labels do not follow such pixels: outside there is nothing (see `apply_segmentation`).
    """

    def __init__(self, matrix: np.ndarray, height: int, width: int, fill: Fill = 128) -> None:
        super().__init__()
        self.matrix = np.asarray(matrix, dtype=np.float64).reshape(2, 3)
        self.height = height
        self.width = width
        self.fill = fill

    def apply_image(self, img: np.ndarray) -> np.ndarray:
        """(H, W) or (H, W, 3), bilinear: uint8 as it is, other types through float32."""
        if img.ndim == 3 and img.dtype != np.uint8:
            return np.stack([self.apply_image(channel) for channel in np.moveaxis(img, -1, 0)], axis=-1)
        pixels, inverse = img if img.dtype == np.uint8 else img.astype(np.float32), self._inverse_matrix()
        colour: dict[str, Any] = {}
        if self.fill == NEAREST:
            # Pillow knows no such border: the image gets one, as wide as what is seen of it.
            left, top, right, bottom = self._margins(img.shape, inverse)
            pixels = np.pad(pixels, ((top, bottom), (left, right), *[(0, 0)] * (img.ndim - 2)), mode="edge")
            inverse = inverse + np.array([[0.0, 0.0, left], [0.0, 0.0, top]])
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        if self.fill != NEAREST:
            colour = {"fillcolor": self._fill_colour(len(picture.getbands()), img.dtype == np.uint8)}
        moved = picture.transform(
            (self.width, self.height),
            Image.Transform.AFFINE,
            tuple(inverse.ravel()),
            resample=Image.Resampling.BILINEAR,
            **colour,
        )
        return np.asarray(moved).astype(img.dtype, copy=False)

    def apply_coords(self, coords: np.ndarray) -> np.ndarray:
        """(N, 2) xy -> (N, 2) xy."""
        return coords @ self.matrix[:, :2].T + self.matrix[:, 2]

    def apply_segmentation(self, segmentation: np.ndarray) -> np.ndarray:
        """(H, W) of any dtype, nearest neighbour; 0 outside the old image."""
        rows, columns = np.indices((self.height, self.width))
        centres = np.stack([columns.ravel(), rows.ravel()], axis=1) + 0.5
        inverse = self._inverse_matrix()
        x, y = np.floor(centres @ inverse[:, :2].T + inverse[:, 2]).astype(np.int64).T
        inside = (x >= 0) & (x < segmentation.shape[1]) & (y >= 0) & (y < segmentation.shape[0])
        result = np.zeros(self.height * self.width, dtype=segmentation.dtype)
        result[inside] = segmentation[y[inside], x[inside]]
        return result.reshape(self.height, self.width)

    def inverse(self) -> AffineTransform:
        """The map back."""
        return AffineTransform(self._inverse_matrix(), self.height, self.width, self.fill)

    def _inverse_matrix(self) -> np.ndarray:
        return np.linalg.inv(np.vstack([self.matrix, [0.0, 0.0, 1.0]]))[:2]

    def _margins(self, shape: Sequence[int], inverse: np.ndarray) -> tuple[int, int, int, int]:
        """Pixels left, above, right and below of the old image that the new one shows, and one more of each."""
        corners = np.array([[0, 0], [self.width, 0], [0, self.height], [self.width, self.height]])
        seen = corners @ inverse[:, :2].T + inverse[:, 2]
        before = np.maximum(np.ceil(-seen.min(axis=0)), 0).astype(int) + 1
        after = np.maximum(np.ceil(seen.max(axis=0)) - [shape[1], shape[0]], 0).astype(int) + 1
        return int(before[0]), int(before[1]), int(after[0]), int(after[1])

    def _fill_colour(self, bands: int, whole: bool) -> Any:
        values = list(self.fill) if isinstance(self.fill, Sequence) else [self.fill] * bands
        if bands == 1:
            mean = sum(values) / len(values)
            return round(mean) if whole else mean
        return tuple(round(value) for value in values)


class RandomAffine(T.Augmentation):
    """Rotation, scale, shear and translation about the image's centre, with probability `prob`.

    Args:
        rotate: (low, high) degrees, counter-clockwise as seen on the screen.
        translate: (x, y) largest shift as a fraction of width and height.
        scale: (low, high) factor, drawn evenly on a logarithmic scale.
        shear: (low, high) degrees by which vertical lines lean to the right.
        fill: see `AffineTransform`.
        prob: in [0, 1].
    """

    def __init__(
        self,
        rotate: Sequence[float] = (0.0, 0.0),
        translate: Sequence[float] = (0.0, 0.0),
        scale: Sequence[float] = (1.0, 1.0),
        shear: Sequence[float] = (0.0, 0.0),
        fill: Fill = 128,
        prob: float = 1.0,
    ) -> None:
        super().__init__()
        for name, pair in (("rotate", rotate), ("translate", translate), ("scale", scale), ("shear", shear)):
            if not isinstance(pair, Sequence) or len(pair) != 2:
                raise ValueError(f"{name}={pair}: expected two numbers")
        if min(scale) <= 0 or max(map(abs, shear)) >= 90:
            raise ValueError(f"scale={scale}, shear={shear}: expected factors above 0 and angles below 90 degrees")
        if isinstance(fill, str) and fill != NEAREST:
            raise ValueError(f"fill={fill}: expected a grey value, (R, G, B), or {NEAREST}")
        self.rotate, self.translate, self.scale, self.shear = map(tuple, (rotate, translate, scale, shear))
        self.fill = fill
        self.prob = prob

    def get_transform(self, image: np.ndarray) -> T.Transform:
        """Draws a map for an image of this size."""
        height, width = image.shape[:2]
        # Always six draws, so that a change of `prob` does not change the others.
        apply, angle, lean, size, right, down = (self._rand_range() for _ in range(6))
        if apply >= self.prob:
            return T.NoOpTransform()
        shift = (
            width * self.translate[0] * (2 * right - 1),
            height * self.translate[1] * (2 * down - 1),
        )
        matrix = affine_matrix(
            centre=(width / 2, height / 2),
            rotate=_between(self.rotate, angle),
            scale=math.exp(_between(tuple(map(math.log, self.scale)), size)),
            shear=_between(self.shear, lean),
            shift=shift,
        )
        return AffineTransform(matrix, height, width, self.fill)


def affine_matrix(
    centre: tuple[float, float], rotate: float, scale: float, shear: float, shift: tuple[float, float]
) -> np.ndarray:
    """(2, 3) map: lean by `shear` degrees, scale, rotate `rotate` degrees counter-clockwise, all about `centre`; shift.

    Centre and shift are in pixels.
    """
    angle, lean = math.radians(rotate), math.radians(shear)
    # y points down, so that a turn seen as counter-clockwise has its sine where one expects its negative.
    turn = np.array([[math.cos(angle), math.sin(angle)], [-math.sin(angle), math.cos(angle)]])
    linear = scale * turn @ np.array([[1.0, -math.tan(lean)], [0.0, 1.0]])
    offset = np.array(centre) + shift - linear @ np.array(centre)
    return np.column_stack([linear, offset])


def build_augmentations(
    node: Mapping[str, Any] | None, where: str = "data.train_augment"
) -> list[T.Augmentation | T.Transform]:
    """Augmentations of a configuration node `{key: {_target_: class, **arguments}}`, in its order.

    A key set to null is left out. `_target_` may be a class of `detectron2.data.transforms` or of
    `mtl_rcnn.data.transforms`, nothing else.

    Raises:
        ConfigError: an unknown class or unfit arguments; names the key.
    """
    entries = {} if node is None else node
    return [_build(entry, f"{where}.{key}") for key, entry in entries.items() if entry is not None]


def _build(entry: Any, where: str) -> T.Augmentation | T.Transform:
    if not isinstance(entry, Mapping) or _TARGET not in entry:
        raise ConfigError(f"{where}: no {_TARGET}; expected a class such as detectron2.data.transforms.RandomFlip")
    target = _resolve(str(entry[_TARGET]), where)
    arguments = {key: _plain(value, f"{where}.{key}") for key, value in entry.items() if key != _TARGET}
    try:
        return target(**arguments)
    except (TypeError, ValueError, AssertionError) as error:
        raise ConfigError(f"{where}: {entry[_TARGET]} does not take these arguments ({error})") from error


def _plain(value: Any, where: str) -> Any:
    """Lists and mappings of any configuration library as Python's own; nested augmentations are built."""
    if isinstance(value, Mapping):
        return (
            _build(value, where) if _TARGET in value else {key: _plain(v, f"{where}.{key}") for key, v in value.items()}
        )
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(entry, f"{where}[{index}]") for index, entry in enumerate(value)]
    return value


def _resolve(path: str, where: str) -> type[T.Augmentation] | type[T.Transform]:
    module, _, name = path.rpartition(".")
    allowed = _allowed()
    if module not in allowed:
        raise ConfigError(f"{where}.{_TARGET}={path}: augmentations are classes of {' or '.join(allowed)}")
    found = getattr(allowed[module], name, None)
    if not isinstance(found, type) or not issubclass(found, T.Augmentation | T.Transform):
        names = [n for n, c in vars(allowed[module]).items() if isinstance(c, type) and issubclass(c, T.Augmentation)]
        raise ConfigError(f"{where}.{_TARGET}={path}: no such augmentation{suggest(name, names)}")
    return found


def _allowed() -> dict[str, ModuleType]:
    import mtl_rcnn.data.transforms as ours

    return {"detectron2.data.transforms": T, "mtl_rcnn.data.transforms": ours}


def _between(bounds: Sequence[float], fraction: float) -> float:
    low, high = bounds
    return low + (high - low) * fraction
