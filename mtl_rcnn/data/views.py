"""Several views of one image for test-time augmentation: at several sizes, and mirrored."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.data import transforms as T
from torch import Tensor

from mtl_rcnn.data.mapper import read_image
from mtl_rcnn.data.target import Record, Sample


@dataclass(frozen=True)
class View:
    """One view of an image.

    Attributes:
        image: (3, H, W) uint8, network frame, in the network's channel order.
        mirrored: whether left is right.
    """

    image: Tensor
    mirrored: bool


class Views:
    """Makes the views of an image; its sizes first as they are, each followed by its mirror image.

    Args:
        sizes: of each, the augmentations that bring an image to it, which may do nothing but resize.
        flip: whether every size is also seen mirrored.
        input_format: channel order of the network, "BGR" or "RGB".
    """

    def __init__(
        self, sizes: Sequence[Sequence[T.Augmentation | T.Transform]], flip: bool, input_format: str = "BGR"
    ) -> None:
        self.sizes = [T.AugmentationList(list(augmentations)) for augmentations in sizes]
        self.flip = flip
        self.input_format = input_format

    def __call__(self, image: np.ndarray) -> list[View]:
        """Views of (H, W, 3) uint8 RGB."""
        views = []
        for augment in self.sizes:
            given = T.AugInput(image)
            augment(given)
            pixels = given.image[:, :, ::-1] if self.input_format == "BGR" else given.image
            views.append(View(_tensor(pixels), mirrored=False))
            if self.flip:
                views.append(View(_tensor(pixels[:, ::-1]), mirrored=True))
        return views

    def sample(self, image: np.ndarray) -> Sample:
        """The sample of (H, W, 3) uint8 RGB: its `views`, its `height` and `width`."""
        return {"views": self(image), "height": image.shape[0], "width": image.shape[1]}


class ViewMapper:
    """Stands where `Mapper` does in evaluation: makes samples of views in place of an image, without labels.

    Args:
        views: makes them.
        on_error: see `Mapper`.
    """

    def __init__(self, views: Views, on_error: str = "raise") -> None:
        self.views = views
        self.on_error = on_error

    def __call__(self, record: Record, sample_index: int, attempt: int = 0) -> Sample:
        """See `Mapper`."""
        described = {key: record[key] for key in ("height", "width", "image_id", "file_name", "dataset")}
        return {**self.views.sample(read_image(record)), **described, "sample_index": sample_index}


def _tensor(pixels: np.ndarray) -> Tensor:
    return torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
