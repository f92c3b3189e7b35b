"""Stock Detectron2 on Shape Scenes: the same architecture, data and iterations as an experiment of this project.

    make demo
    python benchmarks/against_detectron2.py experiment=demo data.root=outputs/demo_data --ours outputs/demo --seed 0

Everything that learns is Detectron2's own: `GeneralizedRCNN`, `StandardROIHeads`, `DatasetMapper`, its loader,
`DefaultTrainer`, its solver. Only the sizes come from the experiment. Where stock Detectron2 cannot follow:

* It knows one keypoint schema per data set, so the schemas' keypoints stand one after the other in every annotation,
  zero (not annotated) where the class does not own them. This is the channel layout of this project's keypoint task.
* It takes polygons or bitmaps, not both: INPUT.MASK_FORMAT is bitmask.
* It would drop images without keypoints from training: MIN_KEYPOINTS_PER_IMAGE is 0.
* It clips the gradient of each parameter, not of all together: SOLVER.CLIP_GRADIENTS has the experiment's limit.
* Its configuration fixes the width of a ResNet-18 to 64, so the backbone is put together from its classes.

Both results are scored by this project's evaluators, which equal pycocotools (tests/evaluation).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from detectron2.config import CfgNode, get_cfg
from detectron2.data import MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.engine import DefaultTrainer
from detectron2.evaluation import COCOEvaluator
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone import FPN, BasicStem, ResNet
from detectron2.modeling.backbone.fpn import LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicBlock
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig
from torch import nn

from mtl_rcnn import config
from mtl_rcnn.engine.build import build_evaluators
from mtl_rcnn.engine.data import train_datasets, val_datasets
from mtl_rcnn.evaluation.results import evaluate_rows
from mtl_rcnn.tasks.keypoint import Schema, read_schemas

SHOWN = ("detection/AP", "detection/AP50", "mask/AP", "mask/AP50", "keypoint/AP", "keypoint/AP50")


def main() -> None:
    """Trains and evaluates stock Detectron2; prints its metrics beside ours."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="of the training configuration: experiment=demo ...")
    parser.add_argument("--out", type=Path, default=Path("outputs/detectron2"), help="folder to write")
    parser.add_argument("--ours", type=Path, help="this project's run of the same experiment, to print beside")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    experiment = config.compose("train", arguments.overrides)
    _, label_space = train_datasets(experiment)
    schemas = read_schemas(label_space, {}, {})
    register_data(experiment, label_space.classes, schemas, arguments.out)
    stock = stock_config(experiment, label_space.classes, schemas, arguments.out, arguments.seed)
    seconds, results = train_and_predict(stock, experiment, schemas)
    metrics = score(experiment, schemas, results)
    report = {"seconds_training": seconds, "threads": torch.get_num_threads(), "seed": arguments.seed, **metrics}
    (arguments.out / "metrics.json").write_text(json.dumps(report, indent=2), encoding="utf-8")
    print(table(metrics, arguments.ours))


def stock_config(
    experiment: DictConfig, classes: tuple[str, ...], schemas: list[Schema], out: Path, seed: int
) -> CfgNode:
    """Detectron2's configuration of the experiment."""
    settings: dict[str, Any] = {
        "OUTPUT_DIR": str(out),
        "SEED": seed,
        "MODEL.DEVICE": "cpu",
        "MODEL.WEIGHTS": "",
        "VERSION": 2,
        **_trunk(experiment),
        **_heads(experiment, len(classes), schemas[-1].channels.stop),
        **_data_and_solver(experiment),
    }
    cfg = get_cfg()
    cfg.merge_from_list([item for pair in settings.items() for item in pair])
    return cfg


def _trunk(experiment: DictConfig) -> dict[str, Any]:
    """Pixels, backbone, pyramid and proposals."""
    model, rpn = experiment.model, experiment.tasks.detection.rpn
    return {
        "MODEL.PIXEL_MEAN": list(model.pixel_mean),
        "MODEL.PIXEL_STD": list(model.pixel_std),
        "MODEL.BACKBONE.NAME": "resnet_fpn_of_width",
        "MODEL.BACKBONE.FREEZE_AT": model.backbone.freeze_at,
        "MODEL.RESNETS.NORM": model.backbone.norm,
        "MODEL.RESNETS.STEM_OUT_CHANNELS": model.backbone.width,
        "MODEL.FPN.OUT_CHANNELS": model.backbone.fpn_channels,
        "MODEL.FPN.NORM": model.backbone.fpn_norm,
        "MODEL.ANCHOR_GENERATOR.SIZES": [list(sizes) for sizes in rpn.anchor_sizes],
        "MODEL.ANCHOR_GENERATOR.ASPECT_RATIOS": [list(rpn.aspect_ratios)],
        "MODEL.RPN.IN_FEATURES": ["p2", "p3", "p4", "p5", "p6"],
        "MODEL.RPN.BATCH_SIZE_PER_IMAGE": rpn.batch_size_per_image,
        "MODEL.RPN.POSITIVE_FRACTION": rpn.positive_fraction,
        "MODEL.RPN.IOU_THRESHOLDS": list(rpn.iou_thresholds),
        "MODEL.RPN.PRE_NMS_TOPK_TRAIN": rpn.pre_nms_topk[0],
        "MODEL.RPN.PRE_NMS_TOPK_TEST": rpn.pre_nms_topk[1],
        "MODEL.RPN.POST_NMS_TOPK_TRAIN": rpn.post_nms_topk[0],
        "MODEL.RPN.POST_NMS_TOPK_TEST": rpn.post_nms_topk[1],
        "MODEL.RPN.NMS_THRESH": rpn.nms_thresh,
        "MODEL.RPN.SMOOTH_L1_BETA": rpn.smooth_l1_beta,
    }


def _heads(experiment: DictConfig, classes: int, keypoints: int) -> dict[str, Any]:
    """Regions and the box, mask and keypoint heads."""
    model, tasks = experiment.model, experiment.tasks
    box, mask, keypoint = tasks.detection, tasks.mask, tasks.keypoint
    return {
        "MODEL.MASK_ON": True,
        "MODEL.KEYPOINT_ON": True,
        "MODEL.ROI_HEADS.NAME": "StandardROIHeads",
        "MODEL.ROI_HEADS.IN_FEATURES": ["p2", "p3", "p4", "p5"],
        "MODEL.ROI_HEADS.NUM_CLASSES": classes,
        "MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE": model.regions.batch_size_per_image,
        "MODEL.ROI_HEADS.POSITIVE_FRACTION": model.regions.positive_fraction,
        "MODEL.ROI_HEADS.IOU_THRESHOLDS": [model.regions.iou_threshold],
        "MODEL.ROI_HEADS.SCORE_THRESH_TEST": box.score_thresh,
        "MODEL.ROI_HEADS.NMS_THRESH_TEST": box.nms_thresh,
        "MODEL.ROI_BOX_HEAD.NAME": "FastRCNNConvFCHead",
        "MODEL.ROI_BOX_HEAD.NUM_CONV": len(box.conv_dims),
        "MODEL.ROI_BOX_HEAD.CONV_DIM": same(box.conv_dims, 256),
        "MODEL.ROI_BOX_HEAD.NUM_FC": len(box.fc_dims),
        "MODEL.ROI_BOX_HEAD.FC_DIM": same(box.fc_dims, 1024),
        "MODEL.ROI_BOX_HEAD.NORM": box.norm,
        "MODEL.ROI_BOX_HEAD.BBOX_REG_WEIGHTS": list(box.box_weights),
        "MODEL.ROI_BOX_HEAD.SMOOTH_L1_BETA": box.smooth_l1_beta,
        "MODEL.ROI_BOX_HEAD.POOLER_RESOLUTION": box.pooler_resolution,
        "MODEL.ROI_BOX_HEAD.POOLER_SAMPLING_RATIO": box.pooler_sampling_ratio,
        "MODEL.ROI_MASK_HEAD.NAME": "MaskRCNNConvUpsampleHead",
        "MODEL.ROI_MASK_HEAD.NUM_CONV": len(mask.conv_dims) - 1,
        "MODEL.ROI_MASK_HEAD.CONV_DIM": same(mask.conv_dims, 256),
        "MODEL.ROI_MASK_HEAD.NORM": mask.norm,
        "MODEL.ROI_MASK_HEAD.POOLER_RESOLUTION": mask.pooler_resolution,
        "MODEL.ROI_MASK_HEAD.POOLER_SAMPLING_RATIO": mask.pooler_sampling_ratio,
        "MODEL.ROI_KEYPOINT_HEAD.NUM_KEYPOINTS": keypoints,
        "MODEL.ROI_KEYPOINT_HEAD.CONV_DIMS": list(keypoint.conv_dims),
        "MODEL.ROI_KEYPOINT_HEAD.MIN_KEYPOINTS_PER_IMAGE": 0,
        "MODEL.ROI_KEYPOINT_HEAD.NORMALIZE_LOSS_BY_VISIBLE_KEYPOINTS": keypoint.normalize_by == "visible",
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_RESOLUTION": keypoint.pooler_resolution,
        "MODEL.ROI_KEYPOINT_HEAD.POOLER_SAMPLING_RATIO": keypoint.pooler_sampling_ratio,
        "TEST.DETECTIONS_PER_IMAGE": box.detections_per_image,
        "TEST.KEYPOINT_OKS_SIGMAS": [0.05] * keypoints,
    }


def _data_and_solver(experiment: DictConfig) -> dict[str, Any]:
    """Data sets, augmentation and schedule."""
    model, solver, augment = experiment.model, experiment.solver, experiment.data.train_augment
    steps = [int(step * solver.max_iter) if step < 1 else int(step) for step in solver.steps]
    return {
        "DATASETS.TRAIN": ("stock_train",),
        "DATASETS.TEST": ("stock_val",),
        "DATALOADER.NUM_WORKERS": experiment.data.workers,
        "DATALOADER.FILTER_EMPTY_ANNOTATIONS": False,
        "INPUT.FORMAT": model.input_format,
        "INPUT.MIN_SIZE_TRAIN": tuple(augment.resize.short_edge_length),
        "INPUT.MAX_SIZE_TRAIN": augment.resize.max_size,
        "INPUT.MIN_SIZE_TEST": experiment.data.test_augment.resize.short_edge_length,
        "INPUT.MAX_SIZE_TEST": experiment.data.test_augment.resize.max_size,
        "INPUT.RANDOM_FLIP": "horizontal",
        "INPUT.MASK_FORMAT": "bitmask",
        "SOLVER.IMS_PER_BATCH": solver.batch_size,
        "SOLVER.MAX_ITER": solver.max_iter,
        "SOLVER.BASE_LR": solver.lr,
        "SOLVER.MOMENTUM": solver.momentum,
        "SOLVER.NESTEROV": solver.nesterov,
        "SOLVER.WEIGHT_DECAY": solver.weight_decay,
        "SOLVER.WEIGHT_DECAY_NORM": solver.weight_decay_norm,
        "SOLVER.GAMMA": solver.gamma,
        "SOLVER.STEPS": tuple(steps),
        "SOLVER.WARMUP_ITERS": solver.warmup_iters,
        "SOLVER.WARMUP_FACTOR": solver.warmup_factor,
        "SOLVER.CLIP_GRADIENTS.ENABLED": solver.clip_gradients is not None,
        "SOLVER.CLIP_GRADIENTS.CLIP_TYPE": "norm",
        "SOLVER.CLIP_GRADIENTS.CLIP_VALUE": float(solver.clip_gradients or 1.0),
        "SOLVER.CHECKPOINT_PERIOD": solver.max_iter,
        "TEST.EVAL_PERIOD": 0,
    }


def register_data(experiment: DictConfig, classes: tuple[str, ...], schemas: list[Schema], out: Path) -> None:
    """Tells Detectron2 of the experiment's data sets, as "stock_train" and "stock_val"."""
    for split, entry in (("train", experiment.data.train[0]), ("val", experiment.data.val[0])):
        path = out / f"instances_{split}.json"
        path.write_text(json.dumps(one_schema(json.loads(Path(entry.annotations).read_text()), schemas)))
        register_coco_instances(f"stock_{split}", {}, str(path), entry.images)
        names, flips = joined_names(classes, schemas)
        MetadataCatalog.get(f"stock_{split}").set(keypoint_names=names, keypoint_flip_map=flips)


@BACKBONE_REGISTRY.register()
def resnet_fpn_of_width(cfg: CfgNode, input_shape: ShapeSpec) -> nn.Module:
    """A ResNet-18-FPN of any width from Detectron2's parts."""
    width, norm = cfg.MODEL.RESNETS.STEM_OUT_CHANNELS, cfg.MODEL.RESNETS.NORM
    stages = [
        ResNet.make_stage(
            BasicBlock,
            2,
            stride_per_block=[1 if index == 0 else 2, 1],
            in_channels=width * 2 ** max(index - 1, 0),
            out_channels=width * 2**index,
            norm=norm,
        )
        for index in range(4)
    ]
    levels = ["res2", "res3", "res4", "res5"]
    stem = BasicStem(in_channels=input_shape.channels, out_channels=width, norm=norm)
    bottom_up = ResNet(stem, stages, out_features=levels, freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT)
    fpn = cfg.MODEL.FPN
    return FPN(bottom_up, levels, fpn.OUT_CHANNELS, norm=fpn.NORM, top_block=LastLevelMaxPool())


def train_and_predict(cfg: CfgNode, experiment: DictConfig, schemas: list[Schema]) -> tuple[float, Path]:
    """Trains as `tools/train_net.py` of Detectron2 does; returns the seconds and a COCO results file of the
    evaluation images."""
    setup_logger(output=cfg.OUTPUT_DIR)
    trainer = StockTrainer(cfg)
    trainer.resume_or_load(resume=False)
    begin = time.perf_counter()
    trainer.train()  # its last hook evaluates, which takes seconds
    seconds = time.perf_counter() - begin
    written = Path(cfg.OUTPUT_DIR, "coco_instances_results.json")
    rows = json.loads(written.read_text(encoding="utf-8"))
    ids = MetadataCatalog.get("stock_val").thing_dataset_id_to_contiguous_id
    owner = {index: schema for schema in schemas for index in schema.classes}
    for row in rows:
        schema = owner.get(ids[row["category_id"]])
        values = row.pop("keypoints")
        if schema is not None:
            row["keypoints"] = values[3 * schema.channels.start : 3 * schema.channels.stop]
    results = written.with_name("results.json")
    results.write_text(json.dumps(rows), encoding="utf-8")
    return seconds, results


class StockTrainer(DefaultTrainer):
    """`DefaultTrainer` with the evaluator that its own tools/train_net.py chooses for COCO data."""

    @classmethod
    def build_evaluator(cls, cfg: CfgNode, dataset_name: str) -> COCOEvaluator:
        """Boxes and masks: keypoints are scored per schema afterwards."""
        return COCOEvaluator(dataset_name, ("bbox", "segm"), False, cfg.OUTPUT_DIR, use_fast_impl=False)


def score(experiment: DictConfig, schemas: list[Schema], results: Path) -> dict[str, float]:
    """Metrics of a COCO results file, by "task/metric"."""
    _, label_space = train_datasets(experiment)
    records = val_datasets(experiment, label_space)[0].records
    rows = json.loads(results.read_text(encoding="utf-8"))
    metrics: dict[str, float] = {}
    for task, evaluator in build_evaluators(experiment, label_space, records).items():
        key = {"detection": "bbox", "mask": "segmentation", "keypoint": "keypoints"}[task]
        path = results.with_name(f"results_{task}.json")
        path.write_text(json.dumps([row for row in rows if key in row]), encoding="utf-8")
        metrics |= {f"{task}/{name}": metric.value for name, metric in evaluate_rows(evaluator, path).items()}
    return metrics


def one_schema(coco: dict[str, Any], schemas: list[Schema]) -> dict[str, Any]:
    """The same annotations with keypoints of all schemas, one after the other, in every annotation."""
    ids = {category["id"]: index for index, category in enumerate(sorted(coco["categories"], key=lambda c: c["id"]))}
    owner = {index: schema for schema in schemas for index in schema.classes}
    count = schemas[-1].channels.stop
    for annotation in coco["annotations"]:
        values = [0.0] * (3 * count)
        schema = owner.get(ids[annotation["category_id"]])
        if schema is not None:
            values[3 * schema.channels.start : 3 * schema.channels.stop] = annotation["keypoints"]
        annotation["keypoints"] = values
    for category in coco["categories"]:
        category.pop("keypoints", None)
        category.pop("skeleton", None)
    return coco


def joined_names(classes: tuple[str, ...], schemas: list[Schema]) -> tuple[list[str], list[tuple[str, str]]]:
    """Keypoint names "class:name" over all schemas and the pairs that a mirror swaps."""
    names, flips = [], []
    for schema in schemas:
        own = [f"{classes[schema.classes[0]]}:{name}" for name in schema.names]
        flips += [(own[a], own[b]) for a, b in enumerate(schema.mirror) if a < b]
        names += own
    return names, flips


def same(dims: Any, default: int) -> int:
    """The one number that Detectron2 has for all layers' channels."""
    if len(set(dims)) > 1:
        raise SystemExit(f"stock Detectron2 has one number of channels for all layers of a head, not {list(dims)}")
    return dims[0] if dims else default


def table(stock: Mapping[str, float], ours: Path | None) -> str:
    """Markdown: stock Detectron2's metrics, ours and the difference."""
    if ours is None:
        return "\n".join(f"{name}: {stock[name]:.2f}" for name in SHOWN)
    mine = json.loads((ours / "metrics.json").read_text(encoding="utf-8"))
    values = {name.split("/", 1)[1]: value for name, value in mine.items()}
    lines = ["| metric | Detectron2 | mtl_rcnn | difference |", "|---|---|---|---|"]
    for name in SHOWN:
        lines.append(f"| {name} | {stock[name]:.2f} | {values[name]:.2f} | {values[name] - stock[name]:+.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
