"""One augmentation of one image, seen as a geometric map that every label follows."""

from __future__ import annotations

import numpy as np
from detectron2.data import transforms as T


class Geometry:
    """The map from the original image frame (pixels, continuous, x right, y down) to the network frame.

    Args:
        transforms: what was applied to the image, in order.
        height, width: size of the result in pixels.
    """

    def __init__(self, transforms: T.TransformList, height: int, width: int) -> None:
        self.transforms = transforms
        self.height = height
        self.width = width

    @staticmethod
    def identity(height: int, width: int) -> Geometry:
        """The map that leaves an image of this size as it is."""
        return Geometry(T.TransformList([T.NoOpTransform()]), height, width)

    @property
    def mirrored(self) -> bool:
        """Whether the map turns left into right: its determinant is negative, whatever kind of flip did it."""
        origin, x_axis, y_axis = self.points(np.array([[0.0, 0.0], [1.0, 0.0], [0.0, 1.0]]))
        (a, c), (b, d) = x_axis - origin, y_axis - origin
        return bool(a * d - b * c < 0)

    def points(self, points: np.ndarray) -> np.ndarray:
        """(N, 2) xy of the original frame -> (N, 2) float64 xy of the network frame, not clipped."""
        # A copy, since several of Detectron2's transforms move coordinates in place.
        return self.transforms.apply_coords(np.array(points, dtype=np.float64).reshape(-1, 2))

    def boxes(self, boxes: np.ndarray) -> np.ndarray:
        """(N, 4) XYXY -> (N, 4) float64 XYXY around the four moved corners, clipped to the network image."""
        corners = np.asarray(boxes, dtype=np.float64).reshape(-1, 4)[:, [0, 1, 2, 1, 0, 3, 2, 3]]
        moved = self.points(corners).reshape(-1, 4, 2)
        around = np.concatenate([moved.min(axis=1), moved.max(axis=1)], axis=1)
        return np.clip(around, 0, [self.width, self.height, self.width, self.height])

    def raster(self, values: np.ndarray, fill: float = 0) -> np.ndarray:
        """(H0, W0) labels of any dtype -> (H, W), nearest neighbour: no value is mixed with another.

        Args:
            values: one label per pixel.
            fill: label of pixels that show nothing of the original image, such as the corners of a rotated one.
        """
        values = np.ascontiguousarray(values)
        # Detectron2's transforms differ in the dtypes they take, but all take uint8: a label's bytes travel one by one.
        planes = values.view(np.uint8).reshape(*values.shape, values.dtype.itemsize)
        moved = [
            self.transforms.apply_segmentation(np.ascontiguousarray(plane)) for plane in np.moveaxis(planes, -1, 0)
        ]
        result = np.stack(moved, axis=-1).view(values.dtype)[..., 0]
        if fill != 0:
            result[self.transforms.apply_segmentation(np.ones(values.shape, np.uint8)) == 0] = fill
        return result
