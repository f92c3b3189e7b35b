"""Region proposals: Detectron2's RPN with keyed sampling, ignored regions, partly labelled classes, and sums for
losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.proposal_generator.rpn import RPN, StandardRPNHead
from detectron2.structures import Boxes, ImageList, Instances, pairwise_ioa, pairwise_iou
from fvcore.nn import smooth_l1_loss
from torch import Tensor
from torch.nn import functional as F

from mtl_rcnn.modeling.sampling import LabelSampler
from mtl_rcnn.modeling.slots import DetectorSample, Features, LossParts, full_precision
from mtl_rcnn.modeling.suppression import grid_anchors, top_proposals

ANCHOR_STAGE = 0
"""Stage number of anchor draws; region draws use another."""

IGNORE_OVERLAP = 0.5
"""A box is ignored rather than negative when more than this share of its area lies in an ignored region."""


class ProposalNetwork(RPN):
    """Faster R-CNN's region proposal network over a pyramid, one anchor size per level.

    Differs from its base in four points: anchors are drawn by a `LabelSampler`; anchors in ignored regions are
    neither positive nor
    negative; an image of which only some classes are labelled gives no negatives; losses are sums with counts
    (256 anchors per labelled image, as in Detectron2).
    """

    def __init__(
        self,
        features: Mapping[str, ShapeSpec],
        sampler: LabelSampler,
        *,
        anchor_sizes: Sequence[Sequence[int]],
        aspect_ratios: Sequence[float],
        batch_size_per_image: int,
        positive_fraction: float,
        iou_thresholds: Sequence[float],
        pre_nms_topk: Sequence[int],
        post_nms_topk: Sequence[int],
        nms_thresh: float,
        smooth_l1_beta: float,
    ) -> None:
        in_features = list(features)
        anchors = DefaultAnchorGenerator(
            sizes=[list(sizes) for sizes in anchor_sizes],
            aspect_ratios=[list(aspect_ratios)],
            strides=[features[name].stride for name in in_features],
            offset=0.0,
        )
        super().__init__(
            in_features=in_features,
            head=StandardRPNHead(in_channels=features[in_features[0]].channels, num_anchors=anchors.num_anchors[0]),
            anchor_generator=anchors,
            anchor_matcher=Matcher(list(iou_thresholds), [0, -1, 1], allow_low_quality_matches=True),
            box2box_transform=Box2BoxTransform(weights=(1.0, 1.0, 1.0, 1.0)),
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            pre_nms_topk=tuple(pre_nms_topk),
            post_nms_topk=tuple(post_nms_topk),
            nms_thresh=nms_thresh,
            smooth_l1_beta=smooth_l1_beta,
        )
        self.sampler = sampler
        self.strides = [int(features[name].stride) for name in in_features]
        self.anchor_offset = float(anchors.offset)
        self.register_buffer("cell_anchors", torch.stack(list(anchors.cell_anchors)), persistent=False)
        self.test_pre_nms_topk, self.test_post_nms_topk = int(pre_nms_topk[1]), int(post_nms_topk[1])
        self.test_nms_thresh, self.test_min_box_size = float(nms_thresh), float(self.min_box_size)

    @torch.jit.unused
    def forward(
        self, images: ImageList, features: Features, samples: Sequence[DetectorSample]
    ) -> tuple[list[Instances], LossParts]:
        """Proposals of every labelled image (possibly none at all), and the losses `rpn_cls`, `rpn_loc`."""
        levels = [features[name] for name in self.in_features]
        anchors = self.anchor_generator(levels)
        logits, deltas = self._raw(levels)
        losses = self._losses(anchors, logits, deltas, samples)
        if len(images.image_sizes) == 0:
            return [], losses
        logits = [level.detach().float() for level in logits]
        return self.predict_proposals(anchors, logits, [level.detach() for level in deltas], images.image_sizes), losses

    @torch.jit.export
    def proposals(self, features: Features, network_sizes: Tensor) -> list[Tensor]:
        """Boxes (P_i, 4) of B images (`network_sizes` (B, 2): height and width) at test time, on plain tensors."""
        levels = [features[name] for name in self.in_features]
        logits, deltas = self._raw(levels)
        boxes: list[Tensor] = []
        for index, level in enumerate(levels):
            anchors = grid_anchors(level, self.cell_anchors[index], self.strides[index], self.anchor_offset)
            decoded = self.box2box_transform.apply_deltas(
                deltas[index].reshape(-1, 4), anchors.repeat(level.shape[0], 1)
            )
            boxes.append(decoded.view(level.shape[0], -1, 4))
        return top_proposals(
            boxes,
            [level.float() for level in logits],
            network_sizes,
            self.test_nms_thresh,
            self.test_pre_nms_topk,
            self.test_post_nms_topk,
            self.test_min_box_size,
        )

    def _raw(self, levels: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Per level: objectness logits (B, R) and box deltas (B, R, 4), in the order of the anchors."""
        logits, deltas = self.rpn_head(levels)
        return [flatten_anchors(level, 1).squeeze(-1) for level in logits], [flatten_anchors(d, 4) for d in deltas]

    def _losses(
        self, anchors: list[Boxes], logits: list[Tensor], deltas: list[Tensor], samples: Sequence[DetectorSample]
    ) -> LossParts:
        all_anchors = Boxes.cat(anchors)
        all_logits, all_deltas = full_precision(torch.cat(logits, dim=1)), full_precision(torch.cat(deltas, dim=1))
        labels = torch.full(all_logits.shape, -1, dtype=torch.int64, device=all_logits.device)
        targets = torch.zeros(all_deltas.shape, device=all_deltas.device)
        for row, sample in enumerate(samples):
            labels[row], targets[row] = self._label_anchors(all_anchors, sample)
        drawn, positive = labels >= 0, labels == 1
        classification = F.binary_cross_entropy_with_logits(
            all_logits[drawn], labels[drawn].to(all_logits.dtype), reduction="sum"
        )
        localization = smooth_l1_loss(
            all_deltas[positive], targets[positive], beta=self.smooth_l1_beta, reduction="sum"
        )
        count = torch.tensor(float(self.batch_size_per_image * len(samples)), device=all_logits.device)
        return {"rpn_cls": (classification, count), "rpn_loc": (localization, count)}

    @torch.no_grad()
    def _label_anchors(self, anchors: Boxes, sample: DetectorSample) -> tuple[Tensor, Tensor]:
        """Drawn labels (R,) in {-1, 0, 1} and regression targets (R, 4) of one image."""
        boxes: Boxes = sample.instances.gt_boxes
        matched, labels = self.anchor_matcher(pairwise_iou(boxes, anchors))
        labels = labels.to(torch.int64)
        labels[(labels == 0) & ignored(anchors, sample.ignore_boxes)] = -1
        if not bool(sample.labelled_classes.all()):
            labels[labels == 0] = -1
        positive, negative = self.sampler(
            labels, self.batch_size_per_image, self.positive_fraction, 0, sample.sample_index, ANCHOR_STAGE
        )
        labels.fill_(-1)
        labels[positive] = 1
        labels[negative] = 0
        if len(boxes) == 0:
            return labels, torch.zeros_like(anchors.tensor)
        return labels, self.box2box_transform.get_deltas(anchors.tensor, boxes.tensor[matched])


def ignored(boxes: Boxes, regions: Tensor) -> Tensor:
    """(N,) bool: which of N boxes lie in one of the (M, 4) ignored regions with more than half of their area."""
    if len(regions) == 0:
        return torch.zeros(len(boxes), dtype=torch.bool, device=boxes.device)
    return pairwise_ioa(Boxes(regions), boxes).max(dim=0).values > IGNORE_OVERLAP


def flatten_anchors(level: Tensor, box_dim: int) -> Tensor:
    """(B, A * D, H, W) -> (B, H * W * A, D), the order of the anchor generator."""
    batch, channels, height, width = level.shape
    # channels // box_dim is constant under tracing; the batch may be empty, so that no -1 can be inferred.
    level = level.view(batch, channels // box_dim, box_dim, height, width).permute(0, 3, 4, 1, 2)
    return level.reshape(batch, height * width * (channels // box_dim), box_dim)
