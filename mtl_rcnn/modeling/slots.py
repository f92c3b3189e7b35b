"""The network side of a task: three kinds of slots in one trunk, each with one signature.

The trunk calls slots in a fixed order: the detector makes boxes, RoI tasks work on them (in training on sampled
proposals, at test
time on the detections), image tasks work on the pyramid itself. Tasks return loss sums with counts, never means:
only the engine knows the other ranks, and only `balancing` knows weights.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from detectron2.layers import ShapeSpec
from detectron2.structures import ImageList, Instances
from torch import Tensor, nn

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Target
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Evaluator

LossParts = dict[str, tuple[Tensor, Tensor]]
"""{part: (sum, count)}: unweighted sum of a loss and the number it is to be divided by (both scalars); the same
keys at every step."""

Features = dict[str, Tensor]
"""{"p2": (B, C, H/4, W/4), ...}; a dict, since TorchScript knows no other mapping."""


@dataclass(frozen=True)
class Output:
    """One named tensor a task predicts, as written to the manifest of an exported network."""

    name: str
    shape: str
    dtype: str
    meaning: str


@dataclass(frozen=True)
class ClassRows:
    """How the first dimension of a layer's tensors counts classes: `rows` per foreground class in the label space's
    order, then, if `background`, `rows` for the background."""

    rows: int = 1
    background: bool = False


class Task(nn.Module):
    """Base of all tasks. One file holds a task's `Target`, its network part, and its `Evaluator`.

    Args:
        name: the task's name in the configuration.
        label_space: classes of the network.
        features: shapes of the pyramid levels.
    """

    target_class: ClassVar[type[Target]]
    evaluator_class: ClassVar[type[Evaluator]]
    loss_parts: ClassVar[tuple[str, ...]]
    """Keys of `losses`, the same at every step."""
    detectron2_names: ClassVar[Mapping[str, str]] = {}
    """Prefixes of this task's parameters in Detectron2's R-CNNs -> prefixes here (the whole network's names,
    `{name}` is the task's)."""
    torchvision_names: ClassVar[Mapping[str, str]] = {}
    """Regular expressions of whole names in torchvision's detection models -> names here, likewise."""
    class_rows: ClassVar[Mapping[str, ClassRows]] = {}
    """Beginnings of names here whose tensors have rows per class, likewise."""

    def __init__(self, name: str, label_space: LabelSpace, features: Mapping[str, ShapeSpec]) -> None:
        super().__init__()
        self.name = name
        self.num_classes = len(label_space.classes)

    def outputs(self) -> Sequence[Output]:
        """What this task predicts, in the order of the exported network's outputs."""
        raise NotImplementedError

    def manifest(self) -> dict[str, Any]:
        """Anything else a user of the exported network must know, as plain JSON values."""
        return {}


class RegionTask(Task):
    """A slot that reads regions: the detector's second stage and every RoI task. The RoI heads pool for it.

    Args:
        pooler_resolution: S of the pooled features.
        pooler_sampling_ratio: samples per bin side of RoIAlign, 0 for adaptive.
        in_features: pyramid levels to pool from.

    Raises:
        ConfigError: the trunk lacks one of the levels.
    """

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        pooler_resolution: int,
        pooler_sampling_ratio: int = 0,
        in_features: Sequence[str] = ("p2", "p3", "p4", "p5"),
    ) -> None:
        super().__init__(name, label_space, features)
        self.in_features = list(in_features)
        missing = [level for level in self.in_features if level not in features]
        if missing:
            raise ConfigError(
                f"tasks.{name}.in_features={self.in_features}: the trunk has no level {', '.join(missing)}, it has "
                f"{', '.join(features)}; tasks on boxes stand on a pyramid, such as model=resnet50_fpn"
            )
        self.pooler_resolution = pooler_resolution
        self.pooler_sampling_ratio = pooler_sampling_ratio
        channels = features[self.in_features[0]].channels
        self.pooled_shape = ShapeSpec(channels=channels, height=pooler_resolution, width=pooler_resolution)


class DetectorTask(RegionTask):
    """The slot that makes boxes. A network has at most one; RoI tasks need it."""

    score_thresh = 0.0  # no annotation: TorchScript reads those of a class and does not know text
    """Least score of a detection, at inference."""

    def propose(
        self, images: ImageList, features: Features, samples: Sequence[DetectorSample]
    ) -> tuple[list[Instances], LossParts]:
        """Class-free proposals of B labelled images, with `proposal_boxes` and `objectness_logits`, and losses."""
        raise NotImplementedError

    def proposals(self, features: Features, network_sizes: Tensor) -> list[Tensor]:
        """Class-free boxes (P_i, 4) of B images at test time. Scriptable: plain tensors only.

        Args:
            features: pyramid levels, (B, C, H, W) each.
            network_sizes: (B, 2) int64 height and width without padding.
        """
        raise NotImplementedError

    def forward(self, pooled: Tensor) -> tuple[Tensor, Tensor]:
        """Raw output of R regions: class logits (R, C + 1), the last column background, and box deltas (R, 4 * C)."""
        raise NotImplementedError

    def losses(self, raw: tuple[Tensor, Tensor], regions: list[Instances]) -> LossParts:
        """Second-stage losses on sampled regions (see `MultiTaskROIHeads.label_regions`)."""
        raise NotImplementedError

    def decode(self, raw: tuple[Tensor, Tensor], boxes: list[Tensor], network_sizes: Tensor) -> dict[str, Tensor]:
        """Detections of all images: boxes (N, 4) network frame, scores (N,), classes (N,), image_index (N,), in
        image order. Scriptable: plain tensors only.

        Args:
            raw: output of `forward` on the proposals of all images.
            boxes: the proposals, (P_i, 4) per image.
            network_sizes: (B, 2) int64 height and width without padding.
        """
        raise NotImplementedError

    def fixed_proposals(self, features: Features, network_sizes: Tensor) -> tuple[Tensor, Tensor]:
        """`proposals` in a fixed number P per image: boxes (B, P, 4) and (B, P) which of them there are. Needed for
        ONNX alone."""
        raise NotImplementedError

    def fixed_decode(
        self, raw: tuple[Tensor, Tensor], boxes: Tensor, found: Tensor, network_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """`decode` to a fixed number K per image: boxes (B, K, 4), scores (B, K), negative where there is none,
        classes (B, K). `boxes` and `found` are what `fixed_proposals` returns. Needed for ONNX alone."""
        raise NotImplementedError

    def merge_views(self, boxes: Tensor, scores: Tensor, classes: Tensor, size: Tensor) -> dict[str, Tensor]:
        """One image's detections in several views as its detections, as `decode` gives them (test-time augmentation).

        Args:
            boxes: (N, 4) of all views, XYXY pixels of one frame.
            scores, classes: (N,).
            size: (2,) int64 height and width of the frame.
        """
        raise NotImplementedError


@dataclass
class DetectorSample:
    """What the detector needs to know of one labelled image.

    Attributes:
        instances: network-frame Instances with `gt_boxes`, `gt_classes` and the RoI tasks' fields.
        ignore_boxes: (M, 4) XYXY regions that are neither object nor background.
        labelled_classes: (C,) bool: classes that are annotated; others may be visible without a box.
        sample_index: position in the run's stream of samples.
    """

    instances: Instances
    ignore_boxes: Tensor
    labelled_classes: Tensor
    sample_index: int


class RoiTask(RegionTask):
    """A slot that works on regions."""

    def select(self, regions: list[Instances]) -> list[Instances]:
        """The regions of each image that train this task: foreground, and matched to an instance that carries its
        label."""
        return [self._annotated_foreground(image) for image in regions]

    def forward(self, pooled: Tensor) -> Tensor:
        """Raw output of R regions."""
        raise NotImplementedError

    def losses(self, raw: Tensor, regions: list[Instances]) -> LossParts:
        """Loss sums and counts.

        Args:
            raw: output of `forward` on the R selected regions of all images.
            regions: per image, the selected regions with `proposal_boxes`, `gt_classes` and every `gt_*` field of
                the instance each is matched to; images without regions may lack the fields.
        """
        raise NotImplementedError

    def decode(self, raw: Tensor, boxes: Tensor, classes: Tensor, image_index: Tensor) -> dict[str, Tensor]:
        """Predictions in the network frame. Scriptable: plain tensors only.

        Args:
            raw: output of `forward` on R detections.
            boxes: (R, 4) network frame, XYXY pixels.
            classes: (R,) class index.
            image_index: (R,) which image of the batch.
        """
        raise NotImplementedError

    def to_image(
        self, decoded: dict[str, Tensor], boxes: Tensor, scale: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """One image's predictions in its original frame. Scriptable: part of the exported network.

        Args:
            decoded: rows of all decoded tensors that belong to the image, this task's among them.
            boxes: (N, 4) their boxes in the original frame, clipped to it.
            scale: (2,) float, original pixels per network pixel in x and y.
            image_size: (2,) int64, original height and width.
        """
        raise NotImplementedError

    def to_label(
        self, decoded: dict[str, Tensor], boxes: Tensor, scale: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """What `Target.as_label` is given: `to_image`, and whatever else says how sure the task is. Never exported."""
        return self.to_image(decoded, boxes, scale, image_size)

    def grids(self, raw: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """What of R detections has a fixed size, before anything depends on how large a box or an image is; for
        formats without loops (ONNX). By default the raw output.

        Args:
            raw: output of `forward`.
            classes: (R,) class index.
        """
        return {f"{self.name}_raw": raw}

    def unflip(self, raw: Tensor) -> Tensor:
        """Raw output of the regions of a mirrored image as that of the same regions of the image itself (test-time
        augmentation). Only the task knows: a ConfigError if it does not say."""
        raise ConfigError(
            f"tta.flip=true: the task '{self.name}' does not say how its output of a mirrored image is mirrored back "
            f"({type(self).__name__}.unflip); choose tta.flip=false, or leave the task out"
        )

    def average(self, raws: list[Tensor]) -> Tensor:
        """Raw outputs of the same regions in several views as one raw output: their mean."""
        return torch.stack(raws).mean(dim=0)

    def _annotated_foreground(self, regions: Instances) -> Instances:
        foreground = (regions.gt_classes >= 0) & (regions.gt_classes < self.num_classes)
        field = f"gt_has_{self.name}"
        if not regions.has(field):
            # An image without any instance: its regions carry no instance fields, and none is foreground.
            return regions[torch.zeros(0, dtype=torch.int64, device=foreground.device)]
        return regions[torch.nonzero(foreground & regions.get(field)).squeeze(1)]


def full_precision(tensor: Tensor) -> Tensor:
    """bfloat16 and float16 as float32; float32 and float64 as they are."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


class ImageTask(Task):
    """A slot that works on the whole image."""

    def forward(self, features: Features) -> Tensor:
        """Raw output of B images."""
        raise NotImplementedError

    def losses(self, raw: Tensor, targets: list[Any], image_sizes: Sequence[tuple[int, int]]) -> LossParts:
        """Loss sums and counts of the labelled images only: `raw` (V, ...) holds just their rows, `targets` their
        V labels."""
        raise NotImplementedError

    def decode(self, raw: Tensor, padded_size: Tensor) -> dict[str, Tensor]:
        """Predictions (B, ...) in the padded network frame. Scriptable."""
        raise NotImplementedError

    def to_image(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """One image's predictions in its original frame. Scriptable.

        Args:
            decoded: the image's rows of `decode`.
            network_size: (2,) int64 height and width in the network frame, without padding.
            image_size: (2,) int64 original height and width.
        """
        raise NotImplementedError

    def to_label(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """What `Target.as_label` is given: `to_image`, and whatever else says how sure the task is, such as a
        probability per pixel. Never exported."""
        return self.to_image(decoded, network_size, image_size)

    def merge_views(self, views: list[DecodedView], image_size: Tensor) -> dict[str, Tensor]:
        """One image's prediction in its original frame from several views of it (test-time augmentation). Only the task
        knows: a ConfigError if it does not say.

        Args:
            views: at least one.
            image_size: (2,) int64 original height and width.
        """
        raise ConfigError(
            f"tta: the task '{self.name}' does not say how several views of an image are merged "
            f"({type(self).__name__}.merge_views); switch tta off, or leave the task out"
        )


@dataclass
class DecodedView:
    """What an image task says of one view of an image.

    Attributes:
        decoded: the image's rows of `decode`.
        network_size: (2,) int64 height and width in the network frame, without padding.
        mirrored: whether left is right in this view; `decoded` is not mirrored back.
    """

    decoded: dict[str, Tensor]
    network_size: Tensor
    mirrored: bool
