"""A network that labels images: everything its tasks say, with how sure they are, of boxes it finds or is given."""

from __future__ import annotations

import torch
from torch import Tensor

from mtl_rcnn.data.target import GivenBoxes, Prediction
from mtl_rcnn.modeling.inference import InferenceNetwork, at_device_of, given_rows, normalised_batch, size_of
from mtl_rcnn.modeling.slots import Features


class Labeller:
    """Predictions as `Target.as_label` takes them: of the tasks' `to_label`.

    Args:
        network: in evaluation mode, with the tasks that are wanted.
    """

    def __init__(self, network: InferenceNetwork) -> None:
        self.network = network

    @torch.no_grad()
    def __call__(self, image: Tensor, image_size: tuple[int, int], given: GivenBoxes | None = None) -> Prediction:
        """One image's prediction in its own frame, on the CPU.

        Args:
            image: (3, H, W) network frame, values 0..255.
            image_size: original height and width.
            given: boxes to describe, one row each in their order, with a score of one; None: those that are detected.
        """
        network = self.network
        mean = network.pixel_mean
        pixels = normalised_batch([image], mean, network.pixel_std, network.size_divisibility)
        features = network.backbone(pixels)
        network_size, size = size_of(image, mean), at_device_of(torch.tensor(image_size), mean)
        prediction: Prediction = {}
        if network.regions is not None:
            prediction.update(self._regions(features, network_size, size, given))
        for task in network.image_tasks:
            decoded = {key: value[0] for key, value in task.decode(task(features), size_of(pixels, pixels)).items()}
            prediction.update(task.to_label(decoded, network_size, size))
        return {name: value.cpu() for name, value in prediction.items()}

    def _regions(
        self, features: Features, network_size: Tensor, size: Tensor, given: GivenBoxes | None
    ) -> dict[str, Tensor]:
        regions = self.network.regions
        if given is None:
            rows = regions.detect(features, network_size[None])
        else:
            rows = given_rows([given], network_size[None], size[None])
        rows.update(regions.describe(features, rows, 1))
        decoded, boxes, scale = regions.image_rows(rows, 0, network_size, size)
        prediction = {"boxes": boxes, "scores": decoded["scores"], "classes": decoded["classes"]}
        for task in regions.tasks:
            prediction.update(task.to_label(decoded, boxes, scale, size))
        return prediction
