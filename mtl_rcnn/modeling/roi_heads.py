"""Regions: match and sample them once, then let every RoI slot work on its own selection of them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator.proposal_utils import add_ground_truth_to_proposals
from detectron2.modeling.roi_heads import ROI_HEADS_REGISTRY, ROIHeads
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn

from mtl_rcnn.modeling.inference import RegionNetwork
from mtl_rcnn.modeling.roi_align import parallelize
from mtl_rcnn.modeling.rpn import ignored
from mtl_rcnn.modeling.sampling import LabelSampler
from mtl_rcnn.modeling.slots import (
    DetectorSample,
    DetectorTask,
    Features,
    LossParts,
    RegionTask,
    RoiTask,
    full_precision,
)

REGION_STAGE = 1


@ROI_HEADS_REGISTRY.register()
class MultiTaskROIHeads(ROIHeads):
    """Detectron2's RoI heads with a list of branches instead of one attribute per branch.

    Args:
        detector: second stage of the detector slot.
        tasks: RoI slots, in order.
        features: shapes of the pyramid levels.
        sampler: draws the regions that train.
        num_classes: foreground classes.
        batch_size_per_image, positive_fraction: regions drawn per image, and the largest share of positives among them.
        iou_threshold: regions at or above it are positive.
    """

    def __init__(
        self,
        detector: DetectorTask,
        tasks: Sequence[RoiTask],
        features: Mapping[str, ShapeSpec],
        sampler: LabelSampler,
        *,
        num_classes: int,
        batch_size_per_image: int,
        positive_fraction: float,
        iou_threshold: float,
    ) -> None:
        super().__init__(
            num_classes=num_classes,
            batch_size_per_image=batch_size_per_image,
            positive_fraction=positive_fraction,
            proposal_matcher=Matcher([iou_threshold], [0, 1], allow_low_quality_matches=False),
        )
        self.detector = detector
        self.tasks = nn.ModuleDict({task.name: task for task in tasks})
        self.poolers = nn.ModuleDict({task.name: build_pooler(task, features) for task in (detector, *tasks)})
        self.sampler = sampler

    def names(self) -> list[str]:
        """Of the detector and the RoI tasks, in order."""
        return [self.detector.name, *self.tasks]

    def losses(
        self,
        features: Mapping[str, Features],
        proposals: list[Instances],
        samples: Sequence[DetectorSample],
        resting: Collection[str] = (),
    ) -> tuple[dict[str, LossParts], dict[str, Tensor]]:
        """Losses by task name, and log values, of V labelled images (V may be 0; the keys do not depend on it).

        Args:
            features: of each task, pyramid levels of just these images, (V, C, H, W).
            proposals: per image, `proposal_boxes` and `objectness_logits`.
            samples: per image.
            resting: tasks that are left out.
        """
        regions = [self.label_regions(*pair) for pair in zip(proposals, samples, strict=True)]
        losses = {}
        if self.detector.name not in resting:
            raw = self.detector(self.pool(self.detector, features[self.detector.name], _boxes(regions)))
            losses[self.detector.name] = self.detector.losses(raw, regions)
        for name, task in self.tasks.items():
            if name not in resting:
                selected = task.select(regions)
                losses[name] = task.losses(task(self.pool(task, features[name], _boxes(selected))), selected)
        return losses, self._logs(regions)

    def describe(self, features: Features, rows: dict[str, Tensor]) -> dict[str, Tensor]:
        """What every RoI slot says of given detections: `rows` holds boxes (N, 4), classes (N,), image_index (N,)
        in image order."""
        return RegionNetwork(self).describe(features, rows, next(iter(features.values())).shape[0])

    def pool(self, task: RegionTask, features: Features, boxes: list[Boxes]) -> Tensor:
        """(R, C, S, S) features of all images' boxes, in float32: bfloat16 cannot hold coordinates above 256
        pixels exactly."""
        return self.poolers[task.name]([full_precision(features[name]) for name in task.in_features], boxes)

    @torch.no_grad()
    def label_regions(self, proposals: Instances, sample: DetectorSample) -> Instances:
        """Draws the regions of one image that train, and gives each the labels of the instance it is matched to.

        Returns Instances with `proposal_boxes`, `gt_classes` (`num_classes` is background) and, unless the image
        has no instance,
        every `gt_*` field of the instances. Ground-truth boxes are among the candidates, as in Detectron2.
        """
        truth = sample.instances
        (candidates,) = add_ground_truth_to_proposals([truth], [proposals])
        matched, matched_labels = self.proposal_matcher(pairwise_iou(truth.gt_boxes, candidates.proposal_boxes))
        labels = torch.full_like(matched, self.num_classes)
        if len(truth) > 0:
            labels = torch.where(matched_labels == 0, labels, truth.gt_classes[matched])
        labels[(labels == self.num_classes) & ignored(candidates.proposal_boxes, sample.ignore_boxes)] = -1
        drawn = torch.cat(
            self.sampler(
                labels,
                self.batch_size_per_image,
                self.positive_fraction,
                self.num_classes,
                sample.sample_index,
                REGION_STAGE,
            )
        )
        regions = candidates[drawn]
        regions.gt_classes = labels[drawn]
        regions.labelled_classes = sample.labelled_classes.expand(len(drawn), -1)
        if len(truth) > 0:
            for field, value in truth.get_fields().items():
                if not regions.has(field):
                    regions.set(field, value[matched[drawn]])
        return regions

    def _logs(self, regions: list[Instances]) -> dict[str, Tensor]:
        labels = [image.gt_classes for image in regions]
        count = max(len(labels), 1)
        foreground = sum((((label >= 0) & (label < self.num_classes)).sum() for label in labels), torch.tensor(0))
        background = sum(((label == self.num_classes).sum() for label in labels), torch.tensor(0))
        return {"roi/foreground": foreground / count, "roi/background": background / count}


def build_pooler(task: RegionTask, features: Mapping[str, ShapeSpec]) -> ROIPooler:
    """RoIAlign (half-pixel aligned) over the task's pyramid levels."""
    pooler = ROIPooler(
        output_size=task.pooler_resolution,
        scales=tuple(1.0 / features[name].stride for name in task.in_features),
        sampling_ratio=task.pooler_sampling_ratio,
        pooler_type="ROIAlignV2",
    )
    return parallelize(pooler)


def _boxes(regions: list[Instances]) -> list[Boxes]:
    return [image.proposal_boxes for image in regions]
