"""Detectron2's own R-CNN with box, mask and keypoint heads, small, with our network's weights and conventions: the
reference of tests."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.modeling import build_model
from torch import nn

from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def detectron2_rcnn(num_classes: int, num_keypoints: int, normalize_by_visible: bool = True) -> nn.Module:
    """`GeneralizedRCNN` with `StandardROIHeads` in the sizes of `tests.toy.TINY`."""
    return build_model(detectron2_config(num_classes, num_keypoints, normalize_by_visible))


def detectron2_config(num_classes: int, num_keypoints: int, normalize_by_visible: bool = True) -> CfgNode:
    """Its configuration; without keypoints if there are none."""
    cfg = get_cfg()
    cfg.merge_from_list(
        [
            *("MODEL.DEVICE", "cpu"),
            *("MODEL.BACKBONE.NAME", "build_resnet_fpn_backbone"),
            *("MODEL.BACKBONE.FREEZE_AT", 0),
            *("MODEL.RESNETS.DEPTH", 18),
            *("MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
            *("MODEL.RESNETS.NORM", "BN"),
            *("MODEL.RESNETS.OUT_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.IN_FEATURES", ["res2", "res3", "res4", "res5"]),
            *("MODEL.FPN.OUT_CHANNELS", 16),
            *("MODEL.ANCHOR_GENERATOR.SIZES", [[16], [32], [64], [128], [256]]),
            *("MODEL.RPN.IN_FEATURES", ["p2", "p3", "p4", "p5", "p6"]),
            *("MODEL.RPN.PRE_NMS_TOPK_TRAIN", 200),
            *("MODEL.RPN.PRE_NMS_TOPK_TEST", 100),
            *("MODEL.RPN.POST_NMS_TOPK_TRAIN", 100),
            *("MODEL.RPN.POST_NMS_TOPK_TEST", 50),
            *("MODEL.ROI_HEADS.NAME", "StandardROIHeads"),
            *("MODEL.ROI_HEADS.IN_FEATURES", ["p2", "p3", "p4", "p5"]),
            *("MODEL.ROI_HEADS.NUM_CLASSES", num_classes),
            *("MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE", 32),
            *("MODEL.ROI_BOX_HEAD.NAME", "FastRCNNConvFCHead"),
            *("MODEL.ROI_BOX_HEAD.NUM_FC", 2),
            *("MODEL.ROI_BOX_HEAD.FC_DIM", 32),
            *("MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION", 7),
            *("MODEL.MASK_ON", True),
            *("MODEL.ROI_MASK_HEAD.NAME", "MaskRCNNConvUpsampleHead"),
            *("MODEL.ROI_MASK_HEAD.NUM_CONV", 2),
            *("MODEL.ROI_MASK_HEAD.CONV_DIM", 16),
            *("MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION", 14),
            *("MODEL.KEYPOINT_ON", num_keypoints > 0),
            *("MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS", [16, 16]),
            *("MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS", num_keypoints),
            *("MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS", normalize_by_visible),
        ]
    )
    return cfg


def copy_weights(model: MultiTaskRCNN, reference: nn.Module) -> None:
    """Gives `reference` our weights, through each task's own name map; every parameter and buffer of the reference
    must be named."""
    prefixes: dict[str, str] = {"backbone.": "backbone."}
    for task in model.tasks():
        prefixes |= {theirs: ours.format(name=task.name) for theirs, ours in task.detectron2_names.items()}
    ours = model.state_dict()
    renamed = {name: ours[_ours(name, prefixes)] for name in reference.state_dict() if "pixel_" not in name}
    missing, unexpected = reference.load_state_dict(renamed, strict=False)
    assert not unexpected
    assert all("anchor" in name or "pixel_" in name for name in missing), missing


def _ours(name: str, prefixes: Mapping[str, str]) -> str:
    for theirs, ours in prefixes.items():
        if name.startswith(theirs):
            return ours + name[len(theirs) :]
    raise AssertionError(f"no name map for Detectron2's parameter {name}")


def randomise_statistics(model: nn.Module, seed: int) -> None:
    """Gives every batch norm statistics and every small-initialised layer visible weights, so that nothing hides
    behind zeros."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if name.endswith("running_mean"):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
        elif name.endswith("running_var"):
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        elif name.endswith(("predictor.weight", "cls_score.weight", "bbox_pred.weight")):
            tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.1)
