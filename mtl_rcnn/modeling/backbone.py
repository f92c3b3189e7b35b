"""The shared trunk: a ResNet with a feature pyramid, from Detectron2's own layers."""

from __future__ import annotations

from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock, BasicStem, BottleneckBlock, ResNet
from torch import nn

from mtl_rcnn.errors import ConfigError

_STAGES = ["res2", "res3", "res4", "res5"]
BLOCKS_PER_STAGE = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3), 101: (3, 4, 23, 3)}


class ResNetFPN(FPN):
    """A ResNet-FPN whose outputs are p2 ... p6 with strides 4 ... 64.

    Parameter names equal Detectron2's (`bottom_up.res2.0.conv1.weight`, `fpn_lateral2.weight`, ...).

    Args:
        depth: 18, 34, 50 or 101.
        norm: "FrozenBN" (constant statistics of pretrained weights), "BN", "SyncBN" or "GN". From scratch, FrozenBN
            normalises nothing: say BN or GN there.
        freeze_at: how many leading stages are constant: 0 none, 1 the stem, 2 the stem and res2, ... 5 the ResNet.
        stride_in_1x1: where the bottleneck's stride is: True for MSRA's original weights, False for torchvision's.
        width: channels of the stem; 64 in the papers.
        fpn_channels: channels of every pyramid level; 256 in the papers.
        fpn_norm: norm after the pyramid's convolutions, "" for none.
    """

    def __init__(
        self,
        *,
        depth: int,
        norm: str,
        freeze_at: int,
        stride_in_1x1: bool,
        width: int,
        fpn_channels: int,
        fpn_norm: str,
    ) -> None:
        if depth not in BLOCKS_PER_STAGE:
            raise ConfigError(f"model.backbone.depth={depth}: expected one of {sorted(BLOCKS_PER_STAGE)}")
        bottom_up = ResNet(
            BasicStem(in_channels=3, out_channels=width, norm=norm),
            _stages(depth, norm, stride_in_1x1, width),
            out_features=_STAGES,
            freeze_at=freeze_at,
        )
        super().__init__(bottom_up, _STAGES, fpn_channels, norm=fpn_norm, top_block=LastLevelMaxPool())


def trunk_layers(backbone: nn.Module) -> list[nn.Module]:
    """The trunk cut into layers from the image upwards: the stem, one per stage, and the pyramid as the last.

    A bottom-up part may name its own with `layers()`. What a trunk without `bottom_up` has are its own children.
    """
    bottom_up = getattr(backbone, "bottom_up", None)
    if bottom_up is None:
        return list(backbone.children())
    pyramid = nn.ModuleList(child for child in backbone.children() if child is not bottom_up)
    layers = bottom_up.layers() if hasattr(bottom_up, "layers") else bottom_up.children()
    return [*layers, pyramid]


def _stages(depth: int, norm: str, stride_in_1x1: bool, width: int) -> list[list[nn.Module]]:
    bottleneck = depth >= 50
    in_channels, out_channels = width, width * 4 if bottleneck else width
    stages = []
    for stage, blocks in enumerate(BLOCKS_PER_STAGE[depth]):
        kind = BottleneckBlock if bottleneck else BasicBlock
        extra = {"bottleneck_channels": width * 2**stage, "stride_in_1x1": stride_in_1x1} if bottleneck else {}
        strides = [1 if stage == 0 else 2] + [1] * (blocks - 1)
        stages.append(
            ResNet.make_stage(
                kind,
                blocks,
                stride_per_block=strides,
                in_channels=in_channels,
                out_channels=out_channels,
                norm=norm,
                **extra,
            )
        )
        in_channels, out_channels = out_channels, out_channels * 2
    return stages
