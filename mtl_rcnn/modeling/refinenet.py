"""A small trunk that decodes by itself: MobileNet-v2 under a Light-Weight RefineNet, one level of stride 4."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.backbone import Backbone
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.timm_trunk import TimmFeatures

_CHAIN_START = 0.1


class LightWeightRefineNet(Backbone):
    """MobileNet-v2 with the decoder of Nekrasov et al., Light-Weight RefineNet (arXiv 1810.03272), in the arrangement
    of their joint segmentation and depth network (arXiv 1809.04766). One output, p2, of stride 4.

    1x1 convolutions bring the last six stages to one width. From the coarsest resolution to the finest: maps of one
    resolution are added to what comes from below, then ReLU6, a chain of pooled residuals, and, but for the finest, a
    1x1 convolution and bilinear upsampling. The last chain is depthwise. No convolution of the decoder has a bias.

    Departures: weights of the decoder start as He et al. have them (fan out, no ReLU gain), those of the chains at a
    tenth of it, so that a chain begins as the identity: nothing normalises the decoder, and maxima that are added up 16
    times give gradients 50 times as large at the start. The papers do not say. The encoder is timm's, whose parameters
    equal torchvision's in number.

    Args:
        name: of a MobileNet-v2 of timm.
        options, frozen: see `TimmFPN`.
        channels: of the decoder and of p2; 256 in the paper.
        stages: poolings in each chain; 4 in the paper.
    """

    def __init__(self, *, name: str, options: Mapping[str, Any], frozen: bool, channels: int, stages: int) -> None:
        super().__init__()
        self.bottom_up = MobileNetStages(name, options, frozen)
        widths = [shape.channels for shape in self.bottom_up.output_shape().values()]
        self.reduce = nn.ModuleList(_one_by_one(width, channels) for width in widths)
        self.chains = nn.ModuleList(ResidualPooling(channels, stages, grouped=level == 0) for level in range(4))
        self.adapt = nn.ModuleList(_one_by_one(channels, channels) for _ in range(3))
        self._shapes = {"p2": ShapeSpec(channels=channels, stride=4)}
        for part in (self.reduce, self.chains, self.adapt):
            for layer in part.modules():
                if isinstance(layer, nn.Conv2d):
                    nn.init.kaiming_normal_(layer.weight, mode="fan_out", nonlinearity="linear")
        with torch.no_grad():
            for weight in self.chains.parameters():
                weight.mul_(_CHAIN_START)

    @property
    def size_divisibility(self) -> int:
        """Sides of the padded images are multiples of this, so that the stages fit one another."""
        return 32

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and stride of p2."""
        return self._shapes

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"p2": (B, channels, H/4, W/4)}."""
        stages = self.bottom_up(image)
        maps: list[Tensor] = []
        for index, reduce in enumerate(self.reduce):
            maps.append(reduce(stages[f"stage{index}"]))
        # From the coarsest: strides 32, 16, 8, 4.
        scales = [maps[0], maps[1], maps[2] + maps[3], maps[4] + maps[5]]
        below = self.chains[3](F.relu6(scales[3]))
        below = self.chains[2](F.relu6(scales[2] + _upsampled(self.adapt[2](below), scales[2])))
        below = self.chains[1](F.relu6(scales[1] + _upsampled(self.adapt[1](below), scales[1])))
        return {"p2": self.chains[0](F.relu6(scales[0] + _upsampled(self.adapt[0](below), scales[0])))}


class ResidualPooling(nn.Module):
    """Chained residual pooling (Lin et al., arXiv 1611.06612, section 3.2; with 1x1 convolutions as 1810.03272): a 5x5
    maximum and a convolution, again and again; the sum of all results and of the input.

    Args:
        channels: of input and output.
        stages: how many times.
        grouped: whether the convolutions are depthwise.
    """

    def __init__(self, channels: int, stages: int, grouped: bool) -> None:
        super().__init__()
        groups = channels if grouped else 1
        self.stages = nn.ModuleList(_one_by_one(channels, channels, groups) for _ in range(stages))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        pooled = x
        for stage in self.stages:
            pooled = stage(F.max_pool2d(pooled, kernel_size=5, stride=1, padding=2))
            x = x + pooled
        return x


class MobileNetStages(TimmFeatures):
    """The last six stages of a MobileNet-v2, stage0 ... stage5, of strides 4, 8, 16, 16, 32 and 32. Its tensors have
    timm's names after `body.`.

    Args:
        name, options, frozen: see `TimmFPN`.
    """

    def __init__(self, name: str, options: Mapping[str, Any], frozen: bool) -> None:
        if not name.startswith("mobilenetv2_"):
            raise ConfigError(
                f"model.backbone.name={name}: the Light-Weight RefineNet stands on a MobileNet-v2 of timm, such as "
                "mobilenetv2_100; other models go under model=timm_fpn"
            )
        super().__init__(name, options, {"res5": 32}, frozen)
        strides = (4, 8, 16, 16, 32, 32)
        with torch.no_grad():
            found = self._maps(torch.zeros(1, 3, 64, 64))
        shapes = zip(found, strides, strict=True)
        self._shapes = {
            f"stage{index}": ShapeSpec(channels=maps.shape[1], stride=stride)
            for index, (maps, stride) in enumerate(shapes)
        }

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"stage0": (B, C, H/4, W/4), ...}."""
        found: dict[str, Tensor] = {}
        for index, stage in enumerate(self._maps(image)):
            found[f"stage{index}"] = stage
        return found

    def _maps(self, image: Tensor) -> list[Tensor]:
        x = self.body.bn1(self.body.conv_stem(image))
        maps: list[Tensor] = []
        for stage in self.body.blocks:
            x = stage(x)
            maps.append(x)
        return maps[-6:]  # without the first, of stride 2


def _one_by_one(inputs: int, outputs: int, groups: int = 1) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 1, groups=groups, bias=False)


def _upsampled(x: Tensor, like: Tensor) -> Tensor:
    return F.interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)
