"""Tasks with a value per pixel: decoders from the trunk's levels to one map, and maps in the frame of an image."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.errors import ConfigError

KINDS = ("auto", "pyramid", "plain")
_COARSEST = 32
"""Stride beyond which levels are copies for large anchors: they say nothing new."""


def build_decoder(
    channels: int,
    features: Mapping[str, ShapeSpec],
    where: str,
    *,
    kind: str,
    in_features: Sequence[str] | None,
    conv_dim: int,
    norm: str,
    common_stride: int,
) -> PyramidDecoder | PlainDecoder:
    """The decoder of a task.

    Args:
        channels: of its output.
        features: levels of the trunk.
        where: key of the configuration, for messages.
        kind: "pyramid", "plain", or "auto": plain where the trunk has one level, which it has decoded itself.
        in_features: levels to take; None takes those of strides from `common_stride` to 32.
        conv_dim, norm, common_stride: see `PyramidDecoder`.

    Raises:
        ConfigError: an unknown kind or level, levels that are finer than the output, or channels that do not fit the
            norm.
    """
    if kind not in KINDS:
        raise ConfigError(f"{where}.kind={kind}: expected {', '.join(KINDS)}")
    usual = [name for name, shape in features.items() if common_stride <= shape.stride <= _COARSEST]
    names = usual if in_features is None else list(in_features)
    if not names or not set(names) <= set(features):
        known = ", ".join(f"{name} (stride {shape.stride})" for name, shape in features.items())
        raise ConfigError(f"{where}.in_features={names}: expected some of the trunk's levels, which are {known}")
    chosen = {name: features[name] for name in names}
    if kind == "plain" or (kind == "auto" and len(features) == 1):
        finest = min(chosen, key=lambda name: chosen[name].stride)
        return PlainDecoder(finest, chosen[finest], channels)
    if min(shape.stride for shape in chosen.values()) < common_stride:
        raise ConfigError(f"{where}.common_stride={common_stride}: a level of {', '.join(names)} is finer")
    if norm == "GN" and conv_dim % 32:
        raise ConfigError(f"{where}.conv_dim={conv_dim}: GN has 32 groups; choose a multiple of 32, or norm: BN")
    return PyramidDecoder(chosen, channels, conv_dim, norm, common_stride)


class PyramidDecoder(nn.Module):
    """The semantic branch of Panoptic FPN (Kirillov et al., arXiv 1901.02446, section 3.1, figure 3): every level
    passes 3x3 convolutions, each followed by a norm, ReLU and x2 bilinear upsampling, until it has the common stride;
    the levels are added, and a 1x1 convolution gives the output. The layers are Detectron2's `SemSegFPNHead`'s.

    Args:
        features: the levels to take.
        channels: of the output.
        conv_dim: channels of the convolutions; 128 in the paper.
        norm: after each; "GN" in the paper.
        common_stride: of the output; 4 in the paper.
    """

    def __init__(
        self, features: Mapping[str, ShapeSpec], channels: int, conv_dim: int, norm: str, common_stride: int
    ) -> None:
        super().__init__()
        head = SemSegFPNHead(
            dict(features), num_classes=channels, conv_dims=conv_dim, common_stride=common_stride, norm=norm
        )
        layers = dict(head.named_children())
        self.predictor = layers.pop("predictor")
        self.scales = nn.ModuleDict({name: layers[name] for name in head.in_features})
        for module in self.scales.modules():
            if getattr(module, "activation", None) is not None:
                module.activation = nn.ReLU()  # a module, where TorchScript does not take the function
        self.stride = common_stride

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(B, channels, H/stride, W/stride) of the padded network frame."""
        levels: list[Tensor] = []
        for name, scale in self.scales.items():
            levels.append(scale(features[name]))
        total = levels[0]
        for level in levels[1:]:
            total = total + level
        return self.predictor(total)


class PlainDecoder(nn.Module):
    """The head of a trunk that decodes by itself: depthwise 1x1 convolution, ReLU6, 3x3 convolution (Nekrasov et al.,
    arXiv 1809.04766, as their `models.py` has it).

    Args:
        level: name of the level to take.
        shape: its channels and stride.
        channels: of the output.
    """

    def __init__(self, level: str, shape: ShapeSpec, channels: int) -> None:
        super().__init__()
        self.level = level
        self.stride = int(shape.stride)
        self.depthwise = nn.Conv2d(shape.channels, shape.channels, 1, groups=shape.channels, bias=False)
        self.activation = nn.ReLU6()
        self.predictor = nn.Conv2d(shape.channels, channels, 3, padding=1)

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(B, channels, H/stride, W/stride) of the padded network frame."""
        return self.predictor(self.activation(self.depthwise(features[self.level])))


def enlarge(maps: Tensor, stride: int, height: int, width: int) -> Tensor:
    """(C, h, w) cells of a padded frame -> (C, height, width) pixels, bilinear.

    Cells that lie in the padding altogether are cut off first, so that nothing of them is mixed into the image.

    Args:
        maps: a value per cell of stride x stride pixels, cell (0, 0) at the upper left.
        height, width: of the image in the frame, without padding.
    """
    rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
    cells = maps[:, :rows, :columns]
    size = [rows * stride, columns * stride]
    return F.interpolate(cells[None], size=size, mode="bilinear", align_corners=False)[0, :, :height, :width]


@torch.jit.script_if_tracing
def in_image_frame(maps: Tensor, stride: int, network_size: Tensor, image_size: Tensor) -> Tensor:
    """(C, h, w) cells of a padded network frame -> (C, H, W) pixels of the original image: `enlarge`, then a second
    bilinear interpolation, as Detectron2's `sem_seg_postprocess`.

    Args:
        maps: see `enlarge`.
        network_size: (2,) int64 height and width in the network frame, without padding.
        image_size: (2,) int64 original height and width.
    """
    pixels = enlarge(maps, stride, int(network_size[0]), int(network_size[1]))
    size = [int(image_size[0]), int(image_size[1])]
    if [pixels.shape[1], pixels.shape[2]] == size:
        return pixels
    return F.interpolate(pixels[None], size=size, mode="bilinear", align_corners=False)[0]
