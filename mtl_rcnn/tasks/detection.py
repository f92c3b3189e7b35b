"""Detection: boxes and classes, by a region proposal network and a second stage (Faster R-CNN, arXiv 1506.01497,
on FPN 1612.03144)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.modeling.roi_heads.fast_rcnn import FastRCNNOutputLayers
from detectron2.structures import Boxes, ImageList, Instances
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from mtl_rcnn.data.faults import DROPPED_ANNOTATION, Fault, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, InstanceTarget, Prediction, Record, Sample, WrittenLabel, place_of
from mtl_rcnn.evaluation.coco import xyxy_to_xywh
from mtl_rcnn.evaluation.coco_evaluator import CocoEvaluator, View
from mtl_rcnn.evaluation.evaluator import Row, instance_rows
from mtl_rcnn.modeling.fixed_size import fixed_detections
from mtl_rcnn.modeling.rpn import ProposalNetwork
from mtl_rcnn.modeling.sampling import LabelSampler
from mtl_rcnn.modeling.slots import ClassRows, DetectorSample, DetectorTask, Features, LossParts, Output, full_precision
from mtl_rcnn.modeling.suppression import top_detections
from mtl_rcnn.visualize.canvas import Canvas, color_of

_NO_SCORE = 1e-8
"""Below it a score stands for none."""


class DetectionTarget(InstanceTarget):
    """Boxes and classes. Every image of a dataset that has classes and does not exclude the task is labelled, possibly
    with nothing in it."""

    def check(self, record: Record) -> Coverage:
        """Counts boxes. DataError: an object without one; their form was checked when the file was read."""
        if not self._labels(record):
            return Coverage(image=False)
        for fault in self.faults(record):
            refuse(fault)
        return Coverage(image=True, instances=sum(not annotation["iscrowd"] for annotation in record["annotations"]))

    def faults(self, record: Record) -> Iterator[Fault]:
        """Annotations without a box: no other task's label can take its place."""
        if not self._labels(record):
            return
        for annotation in record["annotations"]:
            if "bbox" not in annotation:
                message = f"{place_of(record, annotation)} has no 'bbox': add it, or remove the annotation"
                yield Fault(
                    "no box",
                    message,
                    image_id=record["image_id"],
                    annotation_id=annotation["id"],
                    repair=DROPPED_ANNOTATION,
                )

    def load(
        self, record: Record, annotations: Sequence[Mapping[str, Any]], geometry: Geometry
    ) -> dict[str, Any] | None:
        """`gt_boxes`: N Boxes, XYXY pixels of the network frame, clipped to it; `gt_classes`: (N,) int64."""
        if not self._labels(record):
            return None
        corners = np.array([annotation["bbox"] for annotation in annotations], dtype=np.float64).reshape(-1, 4)
        corners[:, 2:] += corners[:, :2]
        classes = [annotation["category_id"] for annotation in annotations]
        return {
            "gt_boxes": Boxes(torch.as_tensor(geometry.boxes(corners), dtype=torch.float32)),
            "gt_classes": torch.tensor(classes, dtype=torch.int64),
        }

    def as_prediction(self, sample: Sample) -> Prediction:
        """boxes (N, 4), classes (N,), scores (N,) of one."""
        instances: Instances = sample["instances"]
        if not instances.has("gt_boxes"):
            return {
                "boxes": torch.zeros(0, 4),
                "classes": torch.zeros(0, dtype=torch.int64),
                "scores": torch.zeros(0),
            }
        boxes = instances.gt_boxes.tensor
        return {"boxes": boxes, "classes": instances.gt_classes, "scores": torch.ones(len(boxes))}

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel:
        """A box, class and score of each detection of at least this score; without any, the image shows nothing."""
        boxes = xyxy_to_xywh(prediction["boxes"])
        rows = zip(boxes, prediction["classes"].tolist(), prediction["scores"].tolist())
        fields = [{"bbox": box, "category_id": index, "score": score} for box, index, score in rows]
        return WrittenLabel(annotations=[row if row["score"] >= threshold else None for row in fields])

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """A box with class and score per instance, each in its own colour."""
        for index, (box, class_index, score) in enumerate(
            zip(prediction["boxes"].tolist(), prediction["classes"].tolist(), prediction["scores"].tolist())
        ):
            name = self.label_space.classes[class_index]
            canvas.box(box, name if score == 1.0 else f"{name} {score:.0%}", color_of(index))

    def _labels(self, record: Record) -> bool:
        """A dataset without any class cannot say that its images show nothing."""
        declared = self.declared(record)
        return bool(record["classes"]) if declared is None else declared


class DetectionEvaluator(CocoEvaluator):
    """COCO box AP over all classes and per class."""

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """COCO detection rows: bbox is [x, y, w, h] in pixels of the original image."""
        return instance_rows(record, prediction, "bbox", xyxy_to_xywh(prediction["boxes"]))

    def views(self) -> list[View]:
        """Boxes, by their IoU."""
        return [View("bbox")]


class DetectionTask(DetectorTask):
    """Region proposals and the box head.

    Args:
        sampler: draws the anchors that train.
        rpn: arguments of `ProposalNetwork`.
        conv_dims, fc_dims, norm: layers of the box head.
        box_weights: scale of the box deltas (dx, dy, dw, dh).
        smooth_l1_beta: of the second stage's box loss; 0 is plain L1.
        score_thresh, nms_thresh, detections_per_image: of inference.
    """

    target_class = DetectionTarget
    evaluator_class = DetectionEvaluator
    loss_parts = ("rpn_cls", "rpn_loc", "cls", "box_reg")
    detectron2_names = {
        "proposal_generator.rpn_head.": "roi_heads.detector.rpn.rpn_head.",
        "roi_heads.box_head.": "roi_heads.detector.box_head.",
        "roi_heads.box_predictor.": "roi_heads.detector.box_predictor.",
    }
    torchvision_names = {
        r"rpn\.head\.conv(?:\.0\.0)?\.(weight|bias)": r"roi_heads.detector.rpn.rpn_head.conv.\1",
        r"rpn\.head\.cls_logits\.(\w+)": r"roi_heads.detector.rpn.rpn_head.objectness_logits.\1",
        r"rpn\.head\.bbox_pred\.(\w+)": r"roi_heads.detector.rpn.rpn_head.anchor_deltas.\1",
        r"roi_heads\.box_head\.fc6\.(\w+)": r"roi_heads.detector.box_head.fc1.\1",
        r"roi_heads\.box_head\.fc7\.(\w+)": r"roi_heads.detector.box_head.fc2.\1",
        r"roi_heads\.box_predictor\.(\w+\.\w+)": r"roi_heads.detector.box_predictor.\1",
    }
    class_rows = {
        "roi_heads.detector.box_predictor.cls_score.": ClassRows(background=True),
        "roi_heads.detector.box_predictor.bbox_pred.": ClassRows(rows=4),
    }

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        sampler: LabelSampler,
        *,
        rpn: Mapping[str, Any],
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        norm: str,
        box_weights: Sequence[float],
        smooth_l1_beta: float,
        score_thresh: float,
        nms_thresh: float,
        detections_per_image: int,
        **pooling: Any,
    ) -> None:
        super().__init__(name, label_space, features, **pooling)
        self.rpn = ProposalNetwork(features, sampler, **rpn)
        self.box_head = FastRCNNConvFCHead(
            self.pooled_shape, conv_dims=list(conv_dims), fc_dims=list(fc_dims), conv_norm=norm
        )
        self.box_predictor = FastRCNNOutputLayers(
            self.box_head.output_shape,
            box2box_transform=Box2BoxTransform(weights=tuple(box_weights)),
            num_classes=self.num_classes,
        )
        self.smooth_l1_beta = smooth_l1_beta
        self.score_thresh = float(score_thresh)
        self.nms_thresh = float(nms_thresh)
        self.detections_per_image = int(detections_per_image)

    def outputs(self) -> list[Output]:
        """Boxes, scores and classes; every RoI task's rows are these rows."""
        return [
            Output("boxes", "(N, 4)", "float32", "x0, y0, x1, y1 in pixels of the original image"),
            Output("scores", "(N,)", "float32", "probability of the class, in descending order"),
            Output("classes", "(N,)", "int64", "index into `classes`"),
        ]

    def propose(
        self, images: ImageList, features: Features, samples: Sequence[DetectorSample]
    ) -> tuple[list[Instances], LossParts]:
        """See the base class; the losses are `rpn_cls` and `rpn_loc`."""
        return self.rpn(images, features, samples)

    @torch.jit.export
    def proposals(self, features: Features, network_sizes: Tensor) -> list[Tensor]:
        """See the base class."""
        return self.rpn.proposals(features, network_sizes)

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Class logits (R, C + 1), the last column background, and class-wise box deltas (R, 4 * C)."""
        logits, deltas = self.box_predictor(self.box_head(pooled))
        return full_precision(logits), full_precision(deltas)

    def losses(self, raw: tuple[Tensor, Tensor], regions: list[Instances]) -> LossParts:
        """`cls`: cross-entropy over R regions; `box_reg`: L1 of the foreground's deltas, divided by R too
        (Detectron2's counts)."""
        logits, deltas = raw
        classes = torch.cat([image.gt_classes for image in regions] or [logits.new_zeros(0, dtype=torch.int64)])
        count = torch.tensor(float(len(classes)), device=logits.device)
        return {
            "cls": (self._classification(logits, classes, regions), count),
            "box_reg": (self._regression(deltas, classes, regions), count),
        }

    @torch.jit.export
    def decode(self, raw: tuple[Tensor, Tensor], boxes: list[Tensor], network_sizes: Tensor) -> dict[str, Tensor]:
        """Score threshold, class-wise NMS and top detections per image, exactly Detectron2's."""
        logits, deltas = raw
        decoded = self.box_predictor.box2box_transform.apply_deltas(deltas, torch.cat(boxes))
        thresholds = (self.score_thresh, self.nms_thresh, self.detections_per_image)
        found = top_detections(decoded, F.softmax(logits, dim=-1), boxes, network_sizes, *thresholds)
        return {"boxes": found[0], "scores": found[1], "classes": found[2], "image_index": found[3]}

    def fixed_proposals(self, features: Features, network_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """See the base class."""
        return self.rpn.fixed_proposals(features, network_sizes)

    def fixed_decode(
        self, raw: tuple[Tensor, Tensor], boxes: Tensor, found: Tensor, network_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        logits, deltas = raw
        decoded = self.box_predictor.box2box_transform.apply_deltas(deltas, boxes.reshape(-1, 4))
        decoded = decoded.reshape(*found.shape, -1, 4).expand(-1, -1, self.num_classes, -1)
        scores = F.softmax(logits, dim=-1)[:, :-1].reshape(*found.shape, self.num_classes)
        thresholds = (self.score_thresh, self.nms_thresh, self.detections_per_image)
        return fixed_detections(decoded, scores, found, network_sizes, *thresholds)

    def merge_views(self, boxes: Tensor, scores: Tensor, classes: Tensor, size: Tensor) -> dict[str, Tensor]:
        """Class-wise NMS and top detections of the union, as Detectron2's `GeneralizedRCNNWithTTA`."""
        spread = scores.new_zeros(len(scores), self.num_classes + 1)
        spread[torch.arange(len(scores), device=scores.device), classes] = scores
        thresholds = (_NO_SCORE, self.nms_thresh, self.detections_per_image)
        found = top_detections(boxes, spread, [boxes], size[None], *thresholds)
        return {"boxes": found[0], "scores": found[1], "classes": found[2], "image_index": found[3]}

    def _classification(self, logits: Tensor, classes: Tensor, regions: list[Instances]) -> Tensor:
        labelled = torch.cat(
            [image.labelled_classes for image in regions] or [logits.new_ones(0, self.num_classes).bool()]
        )
        if bool(labelled.all()):
            return F.cross_entropy(logits, classes, reduction="sum")
        # A background region of a dataset that does not label every class may be of an unlabelled one:
        # its probability is that of the background or of any of these.
        allowed = F.one_hot(classes, self.num_classes + 1).bool()
        background = classes == self.num_classes
        allowed[:, :-1] |= background[:, None] & ~labelled
        chosen = logits.masked_fill(~allowed, float("-inf")).logsumexp(dim=1)
        return (logits.logsumexp(dim=1) - chosen).sum()

    def _regression(self, deltas: Tensor, classes: Tensor, regions: list[Instances]) -> Tensor:
        foreground = torch.nonzero((classes >= 0) & (classes < self.num_classes)).squeeze(1)
        own = deltas.view(len(deltas), self.num_classes, 4)[foreground, classes[foreground]]
        if len(foreground) == 0:
            return own.sum()
        proposals = torch.cat([image.proposal_boxes.tensor for image in regions])
        matched = torch.cat(
            [(image.gt_boxes if image.has("gt_boxes") else image.proposal_boxes).tensor for image in regions]
        )
        targets = self.box_predictor.box2box_transform.get_deltas(proposals[foreground], matched[foreground])
        return smooth_l1_loss(own, targets, beta=self.smooth_l1_beta, reduction="sum")
