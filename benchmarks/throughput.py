"""Images per second of this project, stock Detectron2 and torchvision: the same architecture, weights and images.

    python benchmarks/throughput.py experiment=coco_mini data.root=/path/to/coco_mini --run outputs/coco_mini
    python benchmarks/throughput.py experiment=demo data.root=outputs/demo_data --what inference --batch 8

Box, mask and keypoint heads in all three. Each works on the same few batches, read once and kept in memory, so that
data loading does not count. They take turns, one step each, and the median of the turns is told: a busy machine slows
all of them. The others' weights are this project's, so that there is the same number of detections to describe; how
many each finds is printed, since torchvision rounds anchors and does not align RoIs. `--run` gives trained weights;
without it they are random, which is fair in training alone.

Where a network does less or more than the others: torchvision trains masks and keypoints on every positive region,
whether annotated or not, and draws its own regions; in inference, all three paste masks into the image.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from against_detectron2 import stock_config
from detectron2.modeling import build_model as build_stock
from detectron2.structures import BitMasks
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from torch import Tensor, nn
from torchvision.models import resnet18
from torchvision.models.detection import MaskRCNN
from torchvision.models.detection.anchor_utils import AnchorGenerator
from torchvision.models.detection.backbone_utils import BackboneWithFPN
from torchvision.models.detection.faster_rcnn import FastRCNNPredictor, TwoMLPHead
from torchvision.models.detection.keypoint_rcnn import KeypointRCNNHeads, KeypointRCNNPredictor
from torchvision.models.detection.mask_rcnn import MaskRCNNHeads, MaskRCNNPredictor
from torchvision.ops import MultiScaleRoIAlign

from mtl_rcnn import config
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.losses import reduce_losses
from mtl_rcnn.engine.pretrained.names import rename
from mtl_rcnn.engine.pretrained.weight_file import WeightFile
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.export.scripting import script_network
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.tasks.keypoint import read_schemas

Step = Callable[[list[Sample]], Any]
PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}


def main() -> None:
    """Measures what the command line asks for, and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="of the training configuration: experiment=demo ...")
    parser.add_argument("--what", nargs="+", default=["training", "inference"], choices=["training", "inference"])
    parser.add_argument("--precision", nargs="+", default=["float32", "bfloat16"], choices=list(PRECISIONS))
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="images per step of inference")
    parser.add_argument("--turns", type=int, default=12, help="steps of each network that count")
    parser.add_argument("--run", type=Path, help="a run of the experiment, for trained weights")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    cfg = config.compose("train", arguments.overrides)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        networks, samples = build(cfg, arguments.run, Path(folder))
    if "inference" in arguments.what:  # first: training changes the weights of each in its own way
        for size in arguments.batch:
            steps = inference_steps(networks)
            rows += measure(f"inference, batch {size}", steps, batches(samples, size), arguments.turns)
    if "training" in arguments.what:
        for precision in arguments.precision:
            steps = training_steps(networks, precision)
            rows += measure(f"training, {precision}", steps, batches(samples, cfg.solver.batch_size), arguments.turns)
    print(table(rows))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def build(cfg: DictConfig, run: Path | None, scratch: Path) -> tuple[dict[str, nn.Module], list[Sample]]:
    """The three networks with one set of weights, and 16 training samples."""
    ranks = Ranks(0, 1, 0, torch.device("cpu"))
    if run is None:
        datasets, label_space = train_datasets(cfg)
        model = build_model(cfg, label_space)
    else:
        restored = restore(run)
        model, label_space = restored.model, restored.label_space
        datasets, _ = train_datasets(cfg)
    schemas = read_schemas(label_space, {}, {})
    stock = build_stock(stock_config(cfg, label_space.classes, schemas, scratch, seed=0))
    peer = torchvision_rcnn(cfg, label_space, schemas[-1].channels.stop)
    share_weights(model, stock)
    share_weights(model, peer)
    loader = iter(train_loader(cfg, datasets, build_targets(cfg, label_space), 0, ranks))
    samples: list[Sample] = []
    while len(samples) < 16:
        samples += next(loader)
    for sample in samples:  # torchvision is given network-sized images, so that all paste masks into these
        sample["height"], sample["width"] = sample["image"].shape[-2:]
    return {"mtl_rcnn": model, "Detectron2": stock, "torchvision": peer}, samples


def torchvision_rcnn(cfg: DictConfig, label_space: LabelSpace, keypoints: int) -> nn.Module:
    """Torchvision's Mask R-CNN on a ResNet-18-FPN, with the keypoint branch that its RoI heads can have besides."""
    trunk, tasks = cfg.model.backbone, cfg.tasks
    channels = trunk.fpn_channels
    body = resnet18(weights=None, norm_layer=nn.BatchNorm2d)
    levels = {f"layer{index + 1}": str(index) for index in range(4)}
    backbone = BackboneWithFPN(body, levels, [trunk.width * 2**index for index in range(4)], channels)
    rpn, box, mask, keypoint = tasks.detection.rpn, tasks.detection, tasks.mask, tasks.keypoint
    count = len(label_space.classes) + 1
    network = MaskRCNN(
        backbone,
        image_mean=[value / 255 for value in cfg.model.pixel_mean],
        image_std=[value / 255 for value in cfg.model.pixel_std],
        rpn_anchor_generator=AnchorGenerator(
            tuple(map(tuple, rpn.anchor_sizes)), (tuple(rpn.aspect_ratios),) * len(rpn.anchor_sizes)
        ),
        rpn_pre_nms_top_n_train=rpn.pre_nms_topk[0],
        rpn_pre_nms_top_n_test=rpn.pre_nms_topk[1],
        rpn_post_nms_top_n_train=rpn.post_nms_topk[0],
        rpn_post_nms_top_n_test=rpn.post_nms_topk[1],
        rpn_batch_size_per_image=rpn.batch_size_per_image,
        box_roi_pool=_pooler(box),
        box_head=TwoMLPHead(channels * box.pooler_resolution**2, box.fc_dims[0]),
        box_predictor=FastRCNNPredictor(box.fc_dims[-1], count),
        box_score_thresh=box.score_thresh,
        box_nms_thresh=box.nms_thresh,
        box_detections_per_img=box.detections_per_image,
        box_batch_size_per_image=cfg.model.regions.batch_size_per_image,
        box_positive_fraction=cfg.model.regions.positive_fraction,
        mask_roi_pool=_pooler(mask),
        mask_head=MaskRCNNHeads(channels, list(mask.conv_dims[:-1]), 1),
        mask_predictor=MaskRCNNPredictor(mask.conv_dims[-2], mask.conv_dims[-1], count),
        _skip_resize=True,
    )
    heads = network.roi_heads
    heads.keypoint_roi_pool = _pooler(keypoint)
    heads.keypoint_head = KeypointRCNNHeads(channels, list(keypoint.conv_dims))
    heads.keypoint_predictor = KeypointRCNNPredictor(keypoint.conv_dims[-1], keypoints)
    return network


def _pooler(task: DictConfig) -> MultiScaleRoIAlign:
    return MultiScaleRoIAlign(["0", "1", "2", "3"], task.pooler_resolution, task.pooler_sampling_ratio)


def share_weights(model: MultiTaskRCNN, peer: nn.Module) -> None:
    """Gives a peer our weights, through the name maps by which its files are imported.

    Raises:
        SystemExit: a parameter of one network is not in the other: they are not the same architecture.
    """
    ours = model.state_dict()
    renamed = rename(WeightFile(type(peer).__name__, peer.state_dict()), model)
    missing = {name for name, _ in model.named_parameters()} - set(renamed.tensors)
    if missing or set(renamed.tensors) - set(ours):
        raise SystemExit(f"{type(peer).__name__} is another network: {sorted(missing)[:3]}")
    layers = {s.format(name=task.name): rows for task in model.tasks() for s, rows in task.class_rows.items()}
    for name, theirs in renamed.tensors.items():
        mine = ours[name]
        rows = next((layout for start, layout in layers.items() if name.startswith(start)), None)
        if rows is not None and renamed.background_first:
            count = theirs.shape[0] - rows.rows
            theirs[rows.rows :].copy_(mine[:count])
            if rows.background:
                theirs[: rows.rows].copy_(mine[count:])
        else:
            theirs.copy_(mine)


def training_steps(networks: Mapping[str, nn.Module], precision: str) -> dict[str, Step]:
    """One step of each: forward, backward, SGD."""
    ranks = Ranks(0, 1, 0, torch.device("cpu"))

    def ours(network: nn.Module, batch: list[Sample]) -> Tensor:
        sums, _ = network(batch)
        return torch.stack(list(reduce_losses(sums, batch, ranks).losses.values())).sum()

    def stock(network: nn.Module, batch: list[Sample]) -> Tensor:
        with EventStorage():
            return sum(network(batch).values())

    def peer(network: nn.Module, batch: list[Sample]) -> Tensor:
        return sum(network(*as_torchvision(batch)).values())

    losses = {"mtl_rcnn": ours, "Detectron2": stock, "torchvision": peer}
    return {name: _stepper(network.train(), losses[name], PRECISIONS[precision]) for name, network in networks.items()}


def _stepper(
    network: nn.Module, loss_of: Callable[[nn.Module, list[Sample]], Tensor], half: torch.dtype | None
) -> Step:
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-5, momentum=0.9)

    def step(batch: list[Sample]) -> None:
        optimizer.zero_grad()
        with torch.autocast("cpu", half, enabled=half is not None):
            loss = loss_of(network, batch)
        loss.backward()
        optimizer.step()

    return step


def inference_steps(networks: Mapping[str, nn.Module]) -> dict[str, Step]:
    """Prediction of a batch, in the original frames, by each, and by our and torchvision's TorchScript."""
    ours, stock, peer = (networks[name].eval() for name in ("mtl_rcnn", "Detectron2", "torchvision"))
    our_script = script_network(ours, InferenceNetwork(ours).eval())
    peer_script = torch.jit.script(peer)

    def predict(step: Step) -> Step:
        def run(batch: list[Sample]) -> Any:
            with torch.inference_mode():
                return step(batch)

        return run

    def sizes(batch: list[Sample]) -> list[Tensor]:
        return [torch.tensor([sample["height"], sample["width"]]) for sample in batch]

    return {
        "mtl_rcnn": predict(ours),
        "Detectron2": predict(stock),
        "torchvision": predict(lambda batch: peer(as_torchvision(batch)[0])),
        "mtl_rcnn, TorchScript": predict(lambda batch: our_script([s["image"] for s in batch], sizes(batch))),
        "torchvision, TorchScript": predict(lambda batch: peer_script(as_torchvision(batch)[0])[1]),
    }


def as_torchvision(batch: list[Sample]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Images with values 0..1 and labels counted from 1."""
    images, targets = [], []
    for sample in batch:
        instances = sample["instances"]
        height, width = sample["image"].shape[-2:]
        masks = instances.gt_masks if instances.has("gt_masks") else BitMasks(torch.zeros(0, height, width))
        masks = masks if isinstance(masks, BitMasks) else BitMasks.from_polygon_masks(masks, height, width)
        images.append(sample["image"].float() / 255)
        targets.append(
            {
                "boxes": instances.gt_boxes.tensor,
                "labels": instances.gt_classes + 1,
                "masks": masks.tensor.to(torch.uint8),
                "keypoints": instances.gt_keypoints.tensor.float(),
            }
        )
    return images, targets


def batches(samples: list[Sample], size: int) -> list[list[Sample]]:
    """The samples in batches of one size."""
    if size > len(samples):
        raise SystemExit(f"a batch of {size} images: there are {len(samples)} samples")
    return [samples[start : start + size] for start in range(0, len(samples) - size + 1, size)]


def measure(what: str, steps: Mapping[str, Step], batches: list[list[Sample]], turns: int) -> list[dict[str, Any]]:
    """Runs the networks in turn; the first two turns warm up (TorchScript optimises then) and do not count."""
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    found: dict[str, int] = {}
    for turn in range(-2, turns):
        batch = batches[turn % len(batches)]
        for name, step in steps.items():
            begin = time.perf_counter()
            result = step(batch)
            if turn >= 0:
                seconds[name].append(time.perf_counter() - begin)
                found[name] = found.get(name, 0) + _detections(result)
    reference = statistics.median(seconds["mtl_rcnn"])
    return [
        {
            "what": what,
            "network": name,
            "images_per_second": len(batches[0]) / statistics.median(taken),
            "slowest_over_fastest": max(taken) / min(taken),
            "time_over_ours": statistics.median(taken) / reference,
            "detections": found[name],
        }
        for name, taken in seconds.items()
    ]


def _detections(result: Any) -> int:
    total = 0
    for prediction in result or []:
        whole = prediction.get("instances", prediction)
        total += len(whole) if whole is not prediction else len(prediction["boxes"])
    return total


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown."""
    lines = [
        f"{torch.get_num_threads()} threads, torch {torch.__version__}",
        "| what | network | images/s | time, ours = 1 | slowest/fastest turn | detections |",
        "|---|---|---|---|---|---|",
    ]
    for row in rows:
        lines.append(
            f"| {row['what']} | {row['network']} | {row['images_per_second']:.2f} | {row['time_over_ours']:.2f} | "
            f"{row['slowest_over_fastest']:.1f} | {row['detections']} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
