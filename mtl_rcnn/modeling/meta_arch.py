"""The multi-task network: one trunk, a detector slot, RoI slots and image slots, one forward pass."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch import META_ARCH_REGISTRY
from detectron2.structures import ImageList
from torch import Tensor, nn

from mtl_rcnn.data.target import GivenBoxes, Prediction, Sample, valid_mask
from mtl_rcnn.modeling.feature_cache import FeatureCache
from mtl_rcnn.modeling.feature_split import FeatureSplit
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.resting import resting_losses, unchanged_buffers
from mtl_rcnn.modeling.roi_heads import MultiTaskROIHeads
from mtl_rcnn.modeling.slots import DetectorSample, Features, ImageTask, LossParts, Task

Losses = dict[str, tuple[Tensor, Tensor]]
"""{"task/part": (sum, count)}, the same keys on every rank at every step."""


@META_ARCH_REGISTRY.register()
class MultiTaskRCNN(nn.Module):
    """A shared trunk under any number of tasks.

    Training: `forward(samples, resting) -> (losses, logs)`. Inference: `forward(samples) -> list[Prediction]`, one per
        image, in the original
    image's frame.

    Args:
        backbone: the trunk with its pyramid.
        roi_heads: the detector slot and the RoI slots, or None for a network of image tasks only.
        image_tasks: image slots, in order.
        pixel_mean, pixel_std: per channel of the input, in its order and value range 0..255.
    """

    def __init__(
        self,
        backbone: Backbone,
        roi_heads: MultiTaskROIHeads | None,
        image_tasks: Sequence[ImageTask],
        pixel_mean: Sequence[float],
        pixel_std: Sequence[float],
    ) -> None:
        super().__init__()
        self.backbone = backbone
        self.roi_heads = roi_heads
        self.image_tasks = nn.ModuleDict({task.name: task for task in image_tasks})
        self.split: FeatureSplit | None = None
        """Gives every task features of its own in training, where something is to be done with its gradients."""
        self.cache: FeatureCache | None = None
        """Stands for the trunk in training, if the trunk does not change."""
        self.register_buffer("pixel_mean", torch.tensor(list(pixel_mean)).view(-1, 1, 1), persistent=False)
        self.register_buffer("pixel_std", torch.tensor(list(pixel_std)).view(-1, 1, 1), persistent=False)

    @property
    def device(self) -> torch.device:
        """Where the network lives."""
        return self.pixel_mean.device

    def tasks(self) -> list[Task]:
        """All tasks in slot order: detector, RoI tasks, image tasks."""
        regions = [] if self.roi_heads is None else [self.roi_heads.detector, *self.roi_heads.tasks.values()]
        return [*regions, *self.image_tasks.values()]

    def parts(self) -> dict[str, nn.Module]:
        """The trunk and every task, by name: what a learning rate or a count of parameters is told of."""
        return {"trunk": self.backbone, **{task.name: task for task in self.tasks()}}

    def loss_names(self) -> list[str]:
        """Keys of the losses, "task/part", in slot order."""
        return [f"{task.name}/{part}" for task in self.tasks() for part in task.loss_parts]

    def forward(self, samples: Sequence[Sample], resting: Collection[str] = ()) -> Any:
        """Losses and log values in training mode, predictions otherwise (see the class)."""
        return self.losses(samples, resting) if self.training else self.predict(samples)

    def losses(self, samples: Sequence[Sample], resting: Collection[str] = ()) -> tuple[Losses, dict[str, Tensor]]:
        """Loss sums with counts by "task/part", and values for the log, of one batch.

        Args:
            samples: of the batch.
            resting: tasks that do not train: their losses are 0. Nothing of them is computed, but for the proposals of
                a detector whose boxes others train on.
        """
        pixels = [sample["image"] for sample in samples]
        images = self._normalise(pixels)
        features = self._features(pixels, images)
        by_task = {t.name: resting_losses(t, features[t.name]) for t in self.tasks() if t.name in resting}
        logs: dict[str, Tensor] = {}
        if self.roi_heads is not None and not {*self.roi_heads.names()} <= {*resting}:
            losses, logs = self._region_losses(self.roi_heads, images, features, samples, resting)
            by_task |= losses
        for name, task in self.image_tasks.items():
            if name not in resting:
                by_task[name] = self._image_losses(task, images, features[name], samples)
        return {f"{task}/{part}": value for task, parts in by_task.items() for part, value in parts.items()}, logs

    def predict(self, samples: Sequence[Sample]) -> list[Prediction]:
        """One prediction per image, in its original frame (`height` and `width` of the sample; else the image's
        own size)."""
        return self.predict_tensors(*_with_sizes(samples))

    @torch.no_grad()
    def predict_with_given(
        self, samples: Sequence[Sample], given: Sequence[GivenBoxes]
    ) -> tuple[list[Prediction], list[Prediction]]:
        """What `predict` gives, and what the RoI tasks say of given boxes of the same images, as rows of the same form
        with scores of one. The trunk runs once.

        Args:
            given: per image.
        """
        return InferenceNetwork(self).predict_with_given(*_with_sizes(samples), given)

    @torch.no_grad()
    def predict_tensors(self, images: Sequence[Tensor], image_sizes: Sequence[Tensor]) -> list[Prediction]:
        """As `predict`, on plain tensors; see `InferenceNetwork`.

        Args:
            images: (3, H, W) each, network frame, values 0..255.
            image_sizes: (2,) int64 each, original height and width.
        """
        return InferenceNetwork(self)(list(images), list(image_sizes))

    def hand_out(self, features: Features) -> dict[str, Features]:
        """Each task's features: of its own where there is a `split`, else those of all."""
        if self.split is None:
            return dict.fromkeys((task.name for task in self.tasks()), features)
        return self.split(features)

    def _features(self, pixels: Sequence[Tensor], images: ImageList) -> dict[str, Features]:
        kept = self.cache is not None and self.training
        with nullcontext() if self.split is None else self.split.around_trunk():
            features = self.cache(pixels, images) if kept else self.backbone(images.tensor)
        return self.hand_out(features)

    def _normalise(self, images: Sequence[Tensor]) -> ImageList:
        normalised = [(image.to(self.device) - self.pixel_mean) / self.pixel_std for image in images]
        return ImageList.from_tensors(normalised, self.backbone.size_divisibility)

    def _region_losses(
        self,
        heads: MultiTaskROIHeads,
        images: ImageList,
        features: Mapping[str, Features],
        samples: Sequence[Sample],
        resting: Collection[str],
    ) -> tuple[dict[str, LossParts], dict[str, Tensor]]:
        features = {name: features[name] for name in heads.names()}
        valid = valid_mask(samples, heads.detector.name)
        labelled = [self._detector_sample(sample) for sample, is_valid in zip(samples, valid.tolist()) if is_valid]
        if not bool(valid.all()):
            # Images without boxes leave before the proposals: indexing keeps the graph whole even when none is left.
            chosen = torch.nonzero(valid).squeeze(1).to(self.device)
            features = _of_images(features, chosen)
            sizes = [size for size, is_valid in zip(images.image_sizes, valid.tolist()) if is_valid]
            images = ImageList(images.tensor[chosen], sizes)
        name = heads.detector.name
        if name in resting:
            with torch.no_grad(), unchanged_buffers(heads.detector):
                proposals, _ = heads.detector.propose(images, features[name], labelled)
            return heads.losses(features, proposals, labelled, resting)
        proposals, proposal_losses = heads.detector.propose(images, features[name], labelled)
        losses, logs = heads.losses(features, proposals, labelled, resting)
        losses[name] = proposal_losses | losses[name]
        return losses, logs

    def _detector_sample(self, sample: Sample) -> DetectorSample:
        return DetectorSample(
            instances=sample["instances"].to(self.device),
            ignore_boxes=sample["ignore_boxes"].to(self.device),
            labelled_classes=sample["labelled_classes"].to(self.device),
            sample_index=sample["sample_index"],
        )

    def _image_losses(
        self, task: ImageTask, images: ImageList, features: Features, samples: Sequence[Sample]
    ) -> LossParts:
        valid = valid_mask(samples, task.name)
        raw = task(features)
        if not bool(valid.all()):
            raw = raw[valid.to(raw.device)]
        chosen = torch.nonzero(valid).squeeze(1).tolist()
        targets = [samples[index]["targets"][task.name] for index in chosen]
        return task.losses(raw, targets, [tuple(images.image_sizes[index]) for index in chosen])


def _of_images(features: Mapping[str, Features], chosen: Tensor) -> dict[str, Features]:
    """The chosen images' features of every task; what tasks share they go on sharing."""
    different = {id(levels): levels for levels in features.values()}
    taken = {key: {name: level[chosen] for name, level in levels.items()} for key, levels in different.items()}
    return {task: taken[id(levels)] for task, levels in features.items()}


def _with_sizes(samples: Sequence[Sample]) -> tuple[list[Tensor], list[Tensor]]:
    """The samples' images, and (2,) int64 original height and width of each; else the image's own."""
    images = [sample["image"] for sample in samples]
    sizes = [
        torch.tensor([sample.get("height", image.shape[-2]), sample.get("width", image.shape[-1])])
        for sample, image in zip(samples, images)
    ]
    return images, sizes
