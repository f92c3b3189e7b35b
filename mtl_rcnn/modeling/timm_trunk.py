"""Trunks from timm: any model with a pyramid of features under the FPN, and plain ViTs under a simple pyramid."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from typing import Any

import timm
from detectron2.layers import Conv2d, ShapeSpec
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from mtl_rcnn.errors import ConfigError

_STRIDES = {"res2": 4, "res3": 8, "res4": 16, "res5": 32}


class TimmFPN(FPN):
    """A timm model under a feature pyramid; outputs p2 ... p6 with strides 4 ... 64.

    Args:
        name: of a timm model whose feature maps include strides 4, 8, 16 and 32 (ResNet, ConvNeXt, Swin, MobileNet,
            EfficientNet, ...).
        options: further arguments of `timm.create_model`, such as `{strict_img_size: false}`, which Swin needs to take
            images of any size.
        frozen: the timm model learns nothing, and its batch norms keep their statistics.
        fpn_channels, fpn_norm: of the pyramid.
    """

    def __init__(
        self, *, name: str, options: Mapping[str, Any], frozen: bool, fpn_channels: int, fpn_norm: str
    ) -> None:
        bottom_up = TimmFeatures(name, options, _STRIDES, frozen)
        super().__init__(bottom_up, list(_STRIDES), fpn_channels, norm=fpn_norm, top_block=LastLevelMaxPool())


class ViTPyramid(Backbone):
    """A plain ViT under the simple feature pyramid of ViTDet (Li et al., arXiv 2203.16527, section 3).

    Every level is made of the last feature map, of stride 16, by transposed convolutions or pooling; there are no
    lateral connections. Departure from the paper: all blocks attend globally, none within windows.
    Outputs p2 ... p6 with strides 4 ... 64.

    Args:
        name: of a timm Vision Transformer with patches of 16 pixels.
        options, frozen: see `TimmFPN`.
        fpn_channels: of every level.
    """

    def __init__(self, *, name: str, options: Mapping[str, Any], frozen: bool, fpn_channels: int) -> None:
        super().__init__()
        self.bottom_up = TimmFeatures(name, {"dynamic_img_size": True, **options}, {"last": 16}, frozen)
        width = self.bottom_up.output_shape()["last"].channels
        self.levels = nn.ModuleDict(
            {
                "p2": _level(_four_times(width), width // 4, fpn_channels),
                "p3": _level([_twice(width)], width // 2, fpn_channels),
                "p4": _level([], width, fpn_channels),
                "p5": _level([nn.MaxPool2d(2)], width, fpn_channels),
            }
        )
        self.top_block = LastLevelMaxPool()
        self._shapes = {f"p{level}": ShapeSpec(channels=fpn_channels, stride=2**level) for level in range(2, 7)}

    @property
    def size_divisibility(self) -> int:
        """Sides of the padded images are multiples of this, so that the levels fit one another."""
        return 32

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides of p2 ... p6."""
        return self._shapes

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {"p2": (B, C, H/4, W/4), ...}."""
        last = self.bottom_up(image)["last"]
        levels = {name: level(last) for name, level in self.levels.items()}
        return levels | {"p6": self.top_block(levels["p5"])[0]}


class TimmFeatures(Backbone):
    """Feature maps of a timm model. Its tensors have timm's names after `body.`.

    Args:
        name, options, frozen: see `TimmFPN`.
        strides: {name of an output: its stride}; of several maps with one stride, the last is taken.
    """

    def __init__(self, name: str, options: Mapping[str, Any], strides: Mapping[str, int], frozen: bool) -> None:
        super().__init__()
        self.body = _create(name, options)
        shapes = [(entry["reduction"], entry["num_chs"]) for entry in self.body.feature_info]
        last = {stride: index for index, (stride, _) in enumerate(shapes)}
        missing = sorted(set(strides.values()) - set(last))
        if missing:
            raise ConfigError(
                f"model.backbone.name={name}: has feature maps of strides {', '.join(map(str, sorted(last)))} and "
                f"lacks {', '.join(map(str, missing))}; models of one stride 16 go under model=vit_pyramid, others "
                "under model=timm_fpn"
            )
        self.indices = {output: last[stride] for output, stride in strides.items()}
        self.body.prune_intermediate_layers(sorted(self.indices.values()), prune_norm=True, prune_head=True)
        self._shapes = {
            output: ShapeSpec(channels=shapes[index][1], stride=shapes[index][0])
            for output, index in self.indices.items()
        }
        self.frozen = frozen
        if frozen:
            self.body.requires_grad_(False).eval()

    def output_shape(self) -> dict[str, ShapeSpec]:
        """Channels and strides of the outputs."""
        return self._shapes

    def forward(self, image: Tensor) -> dict[str, Tensor]:
        """(B, 3, H, W) -> {output: (B, C, H/stride, W/stride)}."""
        maps = self.body.forward_intermediates(
            image, indices=list(self.indices.values()), output_fmt="NCHW", intermediates_only=True
        )
        return dict(zip(self.indices, maps, strict=True))

    def layers(self) -> list[nn.Module]:
        """The model cut into layers from the image upwards, sequences of blocks taken apart. Tensors that lie in none
        of them (a ViT's position embedding) belong to the first."""
        layers: list[nn.Module] = []
        for child in self.body.children():
            layers += list(child.children()) if isinstance(child, nn.Sequential | nn.ModuleList) else [child]
        own = nn.ParameterList(self.body.parameters(recurse=False))
        return [
            nn.ModuleList([own, layers[0]]),
            *(layer for layer in layers[1:] if any(True for _ in layer.parameters())),
        ]

    def train(self, mode: bool = True) -> TimmFeatures:
        """As usual, but a frozen model stays in evaluation mode."""
        super().train(mode)
        if self.frozen:
            self.body.eval()
        return self


def _create(name: str, options: Mapping[str, Any]) -> nn.Module:
    if not timm.is_model(name):
        close = difflib.get_close_matches(name, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(close)}?" if close else "timm.list_models() tells their names"
        raise ConfigError(f"model.backbone.name={name}: timm has no such model; {hint}")
    try:
        return timm.create_model(name, pretrained=False, num_classes=0, **options)
    except TypeError as error:
        raise ConfigError(f"model.backbone.options={dict(options)}: {name} does not take them ({error})") from error


def _twice(width: int) -> nn.Module:
    return nn.ConvTranspose2d(width, width // 2, 2, stride=2)


def _four_times(width: int) -> list[nn.Module]:
    return [_twice(width), LayerNorm2d(width // 2), nn.GELU(), _twice(width // 2)]


def _level(scale: Sequence[nn.Module], width: int, channels: int) -> nn.Sequential:
    return nn.Sequential(
        *scale,
        Conv2d(width, channels, 1, bias=False, norm=LayerNorm2d(channels)),
        Conv2d(channels, channels, 3, padding=1, bias=False, norm=LayerNorm2d(channels)),
    )
