"""Mask: one binary mask per instance, predicted per class on a small grid (Mask R-CNN, arXiv 1703.06870, section 3)."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.mask_head import MaskRCNNConvUpsampleHead
from detectron2.structures import BitMasks, Instances, PolygonMasks
from pycocotools import mask as rle_codec
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.data.coco_file import are_numbers
from mtl_rcnn.data.faults import DROPPED_ANNOTATION, Fault, Repair, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, InstanceTarget, Prediction, Record, Sample, WrittenLabel, place_of
from mtl_rcnn.evaluation.coco import encode_masks
from mtl_rcnn.evaluation.coco_evaluator import CocoEvaluator, View
from mtl_rcnn.evaluation.evaluator import Row, instance_rows
from mtl_rcnn.modeling.slots import ClassRows, LossParts, Output, RoiTask, full_precision
from mtl_rcnn.visualize.canvas import Canvas, color_of

MASK_THRESHOLD = 0.5


class MaskTarget(InstanceTarget):
    """Polygons or RLE of each instance, from COCO's `segmentation`. Both may occur in one image; null is an unknown
    mask."""

    def check(self, record: Record) -> Coverage:
        """Counts masks. DataError: a polygon under 3 points, an RLE of another image size, a declared but missing
        mask."""
        if self.declared(record) is False:
            return Coverage(image=False)
        for fault in self.faults(record):
            refuse(fault)
        masks = sum(bool(a.get("segmentation")) for a in record["annotations"] if not a["iscrowd"])
        return Coverage(image=self.declared(record) is True or masks > 0 or not record["annotations"], instances=masks)

    def faults(self, record: Record) -> Iterator[Fault]:
        """Masks of a wrong form, crowds' too (evaluation reads them); masks that are declared but missing."""
        if self.declared(record) is False:
            return
        for annotation in record["annotations"]:
            segmentation = annotation.get("segmentation")
            unknown = "segmentation" in annotation and segmentation is None  # said to be: as good as none
            if not segmentation and self.declared(record) and not annotation["iscrowd"] and not unknown:
                text = (
                    f"has no 'segmentation', but the dataset declares the task '{self.name}': add it, or take "
                    f"'{self.name}' out of the dataset's `tasks`"
                )
                yield self._fault("no mask", text, record, annotation, DROPPED_ANNOTATION)
            elif isinstance(segmentation, list):
                yield from self._polygon_faults(record, annotation, segmentation)
            elif segmentation:
                yield from self._run_length_faults(record, annotation, segmentation)

    def load(
        self, record: Record, annotations: Sequence[Mapping[str, Any]], geometry: Geometry
    ) -> dict[str, Any] | None:
        """`gt_masks`: N PolygonMasks (all polygons) or BitMasks (else) in the network frame; `gt_has_mask`: (N,)
        bool."""
        if self.declared(record) is False:
            return None
        shapes = [annotation.get("segmentation") for annotation in annotations]
        has = torch.tensor([bool(shape) for shape in shapes], dtype=torch.bool)
        polygonal = all(isinstance(shape, list) for shape in shapes if shape)
        masks = _polygons(shapes, geometry) if polygonal else _bitmaps(shapes, record, geometry)
        return {"gt_masks": masks, f"gt_has_{self.name}": has}

    def as_prediction(self, sample: Sample) -> Prediction:
        """masks (N, H, W) bool; an instance without a mask has an empty one."""
        instances: Instances = sample["instances"]
        height, width = sample["image"].shape[-2:]
        if not instances.has("gt_masks") or len(instances) == 0:
            return {"masks": torch.zeros(len(instances), height, width, dtype=torch.bool)}
        masks = instances.gt_masks
        if isinstance(masks, PolygonMasks):
            masks = BitMasks.from_polygon_masks(masks, height, width)
        return {"masks": masks.tensor & instances.get(f"gt_has_{self.name}")[:, None, None]}

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel:
        """Run-length masks, of each instance whose mask is at least as sure as `threshold`; null for the others."""
        sure = (prediction["mask_scores"] >= threshold).tolist()
        masks = encode_masks(prediction["masks"])
        return WrittenLabel(annotations=[{"segmentation": mask if ok else None} for mask, ok in zip(masks, sure)])

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """A translucent area per instance, in the instance's colour."""
        for index, mask in enumerate(prediction["masks"].cpu().numpy()):
            canvas.mask(mask, color_of(index))

    def _polygon_faults(
        self, record: Record, annotation: Mapping[str, Any], polygons: Sequence[Any]
    ) -> Iterator[Fault]:
        faulty = [text for polygon in polygons if (text := _polygon_fault(polygon, record))]
        if not faulty:
            return
        good = [polygon for polygon in polygons if not _polygon_fault(polygon, record)]
        repair = self._removal(record)
        if good:
            repair = Repair("remove the faulty polygons of the mask", fields={"segmentation": good})
        for text in faulty:
            yield self._fault("malformed polygon", f"has {text}", record, annotation, repair)

    def _run_length_faults(self, record: Record, annotation: Mapping[str, Any], value: Any) -> Iterator[Fault]:
        expected = [record["height"], record["width"]]
        size = value.get("size") if isinstance(value, Mapping) else type(value).__name__
        if size != expected:
            kind, text = "mask of another size", f"has a run-length mask of size {size}: expected [height, width] = "
            yield self._fault(kind, text + str(expected), record, annotation, self._removal(record))
        elif (pixels := run_length_sum(value.get("counts"))) != expected[0] * expected[1]:
            found = "no run lengths" if pixels is None else f"run lengths of {pixels} pixels"
            text = f"has {found} in its mask: expected {expected[0]} x {expected[1]} = {expected[0] * expected[1]}"
            yield self._fault("malformed run lengths", text, record, annotation, self._removal(record))

    def _removal(self, record: Record) -> Repair:
        """Of a mask that cannot be mended: where masks are not declared, the box may stay without one."""
        return DROPPED_ANNOTATION if self.declared(record) else Repair("remove the mask", without=("segmentation",))

    def _fault(self, kind: str, text: str, record: Record, annotation: Mapping[str, Any], repair: Repair) -> Fault:
        ids = {"image_id": record["image_id"], "annotation_id": annotation["id"]}
        return Fault(kind, f"{place_of(record, annotation)} {text}", field="segmentation", repair=repair, **ids)


class MaskEvaluator(CocoEvaluator):
    """COCO mask AP over all classes and per class."""

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """COCO segmentation rows: run-length masks of the original image's size."""
        return instance_rows(record, prediction, "segmentation", encode_masks(prediction["masks"]))

    def views(self) -> list[View]:
        """Masks, by their IoU."""
        return [View("segm")]


class MaskTask(RoiTask):
    """Mask R-CNN's mask branch: 3x3 convolutions, one transposed convolution, one 1x1 convolution per class.

    Args:
        conv_dims: channels of the convolutions; the last is the transposed convolution's.
        norm: norm after the convolutions, "" for none.
    """

    target_class = MaskTarget
    evaluator_class = MaskEvaluator
    loss_parts = ("bce",)
    detectron2_names = {"roi_heads.mask_head.": "roi_heads.tasks.{name}.head."}
    torchvision_names = {
        **{
            rf"roi_heads\.mask_head\.{index}\.0\.(\w+)": rf"roi_heads.tasks.{{name}}.head.mask_fcn{index + 1}.\1"
            for index in range(8)
        },
        r"roi_heads\.mask_head\.(mask_fcn\d\.\w+)": r"roi_heads.tasks.{name}.head.\1",
        r"roi_heads\.mask_predictor\.conv5_mask\.(\w+)": r"roi_heads.tasks.{name}.head.deconv.\1",
        r"roi_heads\.mask_predictor\.mask_fcn_logits\.(\w+)": r"roi_heads.tasks.{name}.head.predictor.\1",
    }
    class_rows = {"roi_heads.tasks.{name}.head.predictor.": ClassRows()}

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        *,
        conv_dims: Sequence[int],
        norm: str,
        **pooling: Any,
    ) -> None:
        super().__init__(name, label_space, features, **pooling)
        head = MaskRCNNConvUpsampleHead(
            self.pooled_shape, num_classes=self.num_classes, conv_dims=list(conv_dims), conv_norm=norm
        )
        # Only the layers: the head's own forward takes Instances, which TorchScript cannot.
        self.head = nn.Sequential(OrderedDict(head.named_children()))

    def outputs(self) -> list[Output]:
        """Full-image masks."""
        return [Output("masks", "(N, H, W)", "bool", "instance pixels of the original image, rows as `boxes`")]

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, C, 2S, 2S) mask logits, one per class."""
        return self.head(pooled)

    def losses(self, raw: Tensor, regions: list[Instances]) -> LossParts:
        """`bce`: binary cross-entropy of the true class's mask over all pixels of the R selected regions' grids."""
        used = [image for image in regions if len(image) > 0]
        classes = torch.cat([image.gt_classes for image in used] or [raw.new_zeros(0, dtype=torch.int64)])
        side = raw.shape[-1]
        targets = [image.gt_masks.crop_and_resize(image.proposal_boxes.tensor, side).to(raw.device) for image in used]
        truth = torch.cat(list(targets) or [raw.new_zeros(0, side, side)])
        logits = full_precision(raw[torch.arange(len(classes), device=raw.device), classes])
        loss = F.binary_cross_entropy_with_logits(logits, truth.to(logits.dtype), reduction="sum")
        return {"bce": (loss, torch.tensor(float(truth.numel()), device=raw.device))}

    @torch.jit.export
    def decode(self, raw: Tensor, boxes: Tensor, classes: Tensor, image_index: Tensor) -> dict[str, Tensor]:
        """mask_grids (R, 2S, 2S): probabilities of the predicted class, within the box."""
        return self.grids(raw, classes)

    def grids(self, raw: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """mask_grids (R, 2S, 2S): probabilities of the predicted class, within the box."""
        # Gathered rather than indexed with an `arange`, whose device a trace would write down.
        own = classes[:, None, None, None].expand(-1, 1, raw.shape[2], raw.shape[3])
        return {"mask_grids": raw.gather(1, own)[:, 0].float().sigmoid()}

    def unflip(self, raw: Tensor) -> Tensor:
        """See the base class."""
        return raw.flip(3)

    def average(self, raws: list[Tensor]) -> Tensor:
        """Logits of the mean probability, as Detectron2's `GeneralizedRCNNWithTTA`."""
        return torch.stack([full_precision(raw).sigmoid() for raw in raws]).mean(dim=0).logit()

    @torch.jit.export
    def to_image(
        self, decoded: dict[str, Tensor], boxes: Tensor, scale: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """masks (N, H, W) bool in the original frame."""
        return {"masks": paste_masks(decoded["mask_grids"], boxes, image_size)}

    def to_label(
        self, decoded: dict[str, Tensor], boxes: Tensor, scale: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """masks, and mask_scores (N,) in 0..1: the mean probability of the grid's pixels that make the mask, 0 for an
        empty one."""
        masks = self.to_image(decoded, boxes, scale, image_size)["masks"]
        grids = decoded["mask_grids"]
        inside = grids >= MASK_THRESHOLD
        scores = (grids * inside).sum(dim=(1, 2)) / inside.sum(dim=(1, 2)).clamp(min=1)
        return {"masks": masks, "mask_scores": scores * masks.flatten(1).any(dim=1)}


@torch.jit.script_if_tracing
def paste_masks(grids: Tensor, boxes: Tensor, image_size: Tensor) -> Tensor:
    """Samples every grid at the pixel centres of its box and thresholds: (N, H, W) bool.

    The values are those of Detectron2's `paste_masks_in_image`: bilinear, zero outside the grid. Each mask is
    sampled only around its box.

    Args:
        grids: (N, M, M) probabilities.
        boxes: (N, 4) XYXY pixels of the image.
        image_size: (2,) int64 height and width.
    """
    height, width = int(image_size[0]), int(image_size[1])
    masks = torch.zeros([grids.shape[0], height, width], dtype=torch.bool, device=grids.device)
    for i in range(grids.shape[0]):
        box = boxes[i]
        x0, y0 = max(int(box[0].floor()) - 1, 0), max(int(box[1].floor()) - 1, 0)
        x1, y1 = min(int(box[2].ceil()) + 1, width), min(int(box[3].ceil()) + 1, height)
        x = torch.arange(x0, x1, device=grids.device, dtype=torch.float32) + 0.5
        y = torch.arange(y0, y1, device=grids.device, dtype=torch.float32) + 0.5
        x = (x - box[0]) / (box[2] - box[0]) * 2 - 1
        y = (y - box[1]) / (box[3] - box[1]) * 2 - 1
        grid = torch.stack([x[None, :].expand(y.shape[0], -1), y[:, None].expand(-1, x.shape[0])], dim=2)
        sampled = F.grid_sample(grids[i][None, None], grid[None], align_corners=False)
        masks[i, y0:y1, x0:x1] = sampled[0, 0] >= 0.5
    return masks


def _polygons(shapes: Sequence[Any], geometry: Geometry) -> PolygonMasks:
    placeholder = [np.zeros(6)]
    return PolygonMasks(
        [[geometry.points(np.asarray(p)).reshape(-1) for p in shape] if shape else placeholder for shape in shapes]
    )


def _bitmaps(shapes: Sequence[Any], record: Record, geometry: Geometry) -> BitMasks:
    height, width = record["height"], record["width"]
    masks = np.zeros((len(shapes), geometry.height, geometry.width), dtype=bool)
    for index, shape in enumerate(shapes):
        if shape:
            masks[index] = geometry.raster(decode_segmentation(shape, height, width)).astype(bool)
    return BitMasks(torch.from_numpy(masks))


def decode_segmentation(segmentation: Any, height: int, width: int) -> np.ndarray:
    """COCO polygons, uncompressed or compressed RLE -> (H, W) uint8."""
    if isinstance(segmentation, list):
        segmentation = rle_codec.merge(rle_codec.frPyObjects(segmentation, height, width))
    elif isinstance(segmentation["counts"], list):
        segmentation = rle_codec.frPyObjects(segmentation, height, width)
    return rle_codec.decode(segmentation)


def _polygon_fault(polygon: Any, record: Record) -> str:
    """What is wrong with a polygon, "" if nothing is."""
    if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
        size = len(polygon) if isinstance(polygon, list) else type(polygon).__name__
        return (
            f"a polygon of {size} numbers: expected an even number of at least 6 (3 points x, y); repair or remove "
            "the polygon"
        )
    if not are_numbers(polygon):
        return "a polygon with a coordinate that is not finite"
    # Rasterising takes memory in proportion to the coordinates.
    for side, values in ((record["width"], polygon[0::2]), (record["height"], polygon[1::2])):
        if min(values) < -side or max(values) > 2 * side:
            size = f"{record['width']} x {record['height']} pixels"
            return f"a polygon that reaches from {min(values):g} to {max(values):g}: expected an image of {size}"
    return ""


def run_length_sum(counts: Any) -> int | None:
    """Pixels that the run lengths of a COCO RLE cover, as a list or compressed to text; None if they are neither.

    A text holds numbers of 5 bits a character, low bits first, bit 6 saying that more follow; from the fourth on they
    are differences to the number two before (pycocotools, rleFrString). pycocotools reads whatever it is given, and
    beyond.
    """
    if isinstance(counts, list):
        whole = all(isinstance(count, int) and 0 <= count < 2**32 for count in counts)
        return sum(counts) if whole else None
    if not isinstance(counts, str) or not counts.isascii():
        return None
    digits = np.frombuffer(counts.encode("ascii"), dtype=np.uint8).astype(np.int64) - 48
    ends = np.flatnonzero((digits & 32) == 0)
    if len(ends) == 0 or digits.min() < 0 or digits.max() > 63 or ends[-1] != len(digits) - 1:
        return None
    starts = np.r_[0, ends[:-1] + 1]
    lengths = ends - starts + 1
    if lengths.max() > 7:  # beyond what 32 bits can hold
        return None
    places = np.arange(len(digits)) - np.repeat(starts, lengths)
    runs = np.add.reduceat((digits & 31) << (5 * places), starts)
    runs -= np.where(digits[ends] & 16, np.int64(1) << (5 * lengths), 0)  # the sign
    runs[1::2] = np.cumsum(runs[1::2])
    runs[2::2] = np.cumsum(runs[2::2])
    return int(runs.sum()) if (runs >= 0).all() else None
