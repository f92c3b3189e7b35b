"""A small VGG-like trunk for images of a fixed size, as tutorials on labelling garments use it."""

from __future__ import annotations

from collections.abc import Sequence

from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

LEVEL = "dense"
SIDE = 96
"""Pixels of a side of the images that the layers were made for."""

_BLOCKS = ((3, (32, 32), 3), (32, (64, 64), 2), (64, (128, 128, 128, 128), 2))
"""Channels before each block and of its convolutions, and side of the pooling after it."""
_CELLS = 8
"""Sides of the map before the dense layer: 96 / 3 / 2 / 2."""


class SmallVGG(Backbone):
    """3x3 convolutions 32-32, 64-64, 128-128-128-128, each followed by ReLU and batch norm, with max pooling by 3, 2
    and 2, then a dense layer over all of it. One level, `dense`: (B, D, 1, 1).

    With a linear layer to 6 labels on it, it has 9,177,550 parameters as Keras counts them, 1,408 of them means and
    variances of the batch norms: convolutions have a bias, the dense layer has no norm (Keras' `SmallerVGGNet`, which
    this follows, has one there, another number of convolutions, and 1,024 units).

    The layers were made for images of 96 x 96 pixels, of which 8 x 8 cells reach the dense layer. Of another size, the
    cells are averaged to 8 x 8: it runs, on what it was not made for. A batch of images of several sizes is padded, and
    the padding is averaged in; give all of them one size (`detectron2.data.transforms.Resize`).

    Args:
        dense: units D of the dense layer.
        dropout: probabilities after each pooling, and after the dense layer.
    """

    def __init__(self, *, dense: int, dropout: tuple[float, float]) -> None:
        super().__init__()
        after_pooling, after_dense = dropout
        self.block1, self.block2, self.block3 = (_block(*entry, after_pooling) for entry in _BLOCKS)
        self.dense = nn.Sequential(
            nn.Flatten(), nn.Linear(128 * _CELLS * _CELLS, dense), nn.ReLU(), nn.Dropout(after_dense)
        )
        self.units = dense

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels of the one level; its stride is the side of the images."""
        return {LEVEL: ShapeSpec(channels=self.units, stride=SIDE)}

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"dense": (B, D, 1, 1)}."""
        cells = self.block3(self.block2(self.block1(image)))
        return {"dense": self.dense(F.adaptive_avg_pool2d(cells, [8, 8]))[:, :, None, None]}


def _block(before: int, widths: Sequence[int], side: int, dropout: float) -> nn.Sequential:
    layers: list[nn.Module] = []
    for width in widths:
        layers += [nn.Conv2d(before, width, 3, padding=1), nn.ReLU(), nn.BatchNorm2d(width)]
        before = width
    return nn.Sequential(*layers, nn.MaxPool2d(side), nn.Dropout(dropout))
