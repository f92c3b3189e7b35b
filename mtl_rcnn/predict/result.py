"""What is predicted of one image."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from mtl_rcnn.data.target import Prediction


@dataclass(frozen=True, eq=False)
class Result:
    """One image with its predictions, in the pixels of the image as it is seen (upright).

    Attributes:
        name: of the image within what was predicted on; a frame of a video is `<name of the video>#<frame>`.
        path: the image's or the video's file; None for an image in memory or by its address.
        frame: number in its video, from 0; None for an image.
        image: (H, W, 3) uint8 RGB.
        outputs: every output of the chosen tasks under its declared name, on the CPU; N rows are N detections.
        classes: names by class index.
    """

    name: str
    path: Path | None
    frame: int | None
    image: np.ndarray
    outputs: Prediction
    classes: tuple[str, ...]

    def __len__(self) -> int:
        """N, the number of detections; 0 for a network without a detector."""
        return len(self.outputs.get("scores", ()))

    def __getitem__(self, name: str) -> Tensor:
        """An output by its name."""
        return self.outputs[name]

    @property
    def boxes(self) -> Tensor:
        """(N, 4) float32 x0, y0, x1, y1 in pixels. KeyError without a detector."""
        return self.outputs["boxes"]

    @property
    def scores(self) -> Tensor:
        """(N,) float32 in 0..1, descending. KeyError without a detector."""
        return self.outputs["scores"]

    @property
    def class_names(self) -> list[str]:
        """N names. KeyError without a detector."""
        return [self.classes[index] for index in self.outputs["classes"].tolist()]
