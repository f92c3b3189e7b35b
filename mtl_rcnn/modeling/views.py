"""Test-time augmentation: a network sees an image several times, and says one thing of it.

Boxes of all views are mapped into one frame and suppressed there together. RoI tasks then look at these boxes in every
view; their raw outputs, those of mirrored views mirrored back by the task itself, are averaged and decoded once: what
Detectron2's `GeneralizedRCNNWithTTA` does for boxes and masks, for any task. The frame is that of the largest view that
is not mirrored, so that a single view gives what the network gives without all this, to the last bit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from mtl_rcnn.data.target import GivenBoxes, Prediction, Sample
from mtl_rcnn.data.views import View
from mtl_rcnn.modeling.inference import InferenceNetwork, RegionNetwork, given_rows, normalised_batch, size_of
from mtl_rcnn.modeling.slots import DecodedView, Features


class MultiViewNetwork(nn.Module):
    """A network for samples of views; callable as `MultiTaskRCNN` in evaluation mode.

    The pyramids of all views of an image are in memory at the same time.

    Args:
        network: whose layers it uses.
    """

    def __init__(self, network: InferenceNetwork) -> None:
        super().__init__()
        self.network = network

    @torch.no_grad()
    def forward(self, samples: Sequence[Sample]) -> list[Prediction]:
        """One prediction per sample, in its original frame.

        Args:
            samples: with `views`, of which at least one is not mirrored, and original `height` and `width`.

        Raises:
            ConfigError: a task cannot be mirrored back, or averaged.
        """
        return [self._merged([self._see(view) for view in s["views"]], self._size(s)) for s in samples]

    @torch.no_grad()
    def predict_with_given(
        self, samples: Sequence[Sample], given: Sequence[GivenBoxes]
    ) -> tuple[list[Prediction], list[Prediction]]:
        """What `forward` gives, and what the RoI tasks say of given boxes, averaged over the views as for detections.
        See `MultiTaskRCNN`."""
        regions = self.network.regions
        assert regions is not None, "only a network with a detector describes boxes"
        predictions, described = [], []
        for sample, boxes in zip(samples, given, strict=True):
            seen, image_size = [self._see(view) for view in sample["views"]], self._size(sample)
            predictions.append(self._merged(seen, image_size))
            frame = _frame(seen)
            rows = _described(regions, given_rows([boxes], frame.size[None], image_size[None]), seen, frame)
            described.append(regions.to_image(rows, 0, frame.size, image_size))
        return predictions, described

    def _size(self, sample: Sample) -> Tensor:
        return torch.tensor([sample["height"], sample["width"]], device=self.network.pixel_mean.device)

    def _merged(self, seen: Sequence[_Seen], image_size: Tensor) -> Prediction:
        prediction: Prediction = {}
        if self.network.regions is not None:
            prediction |= _merged_regions(self.network.regions, seen, image_size)
        for task in self.network.image_tasks:
            decoded = [
                DecodedView(_first(task.decode(task(view.features), view.padded_size)), view.size, view.mirrored)
                for view in seen
            ]
            prediction |= task.merge_views(decoded, image_size)
        return prediction

    def _see(self, view: View) -> _Seen:
        network = self.network
        pixels = normalised_batch([view.image], network.pixel_mean, network.pixel_std, network.size_divisibility)
        sizes = size_of(view.image, network.pixel_mean), size_of(pixels, pixels)
        return _Seen(network.backbone(pixels), *sizes, view.mirrored)


@dataclass
class _Seen:
    """A view's pyramid.

    Attributes:
        features: levels (1, C, H, W).
        size, padded_size: (2,) int64 height and width, without and with padding.
        mirrored: see `View`.
    """

    features: Features
    size: Tensor
    padded_size: Tensor
    mirrored: bool


def _merged_regions(regions: RegionNetwork, seen: Sequence[_Seen], image_size: Tensor) -> Prediction:
    frame = _frame(seen)
    found = [regions.detect(view.features, view.size[None]) for view in seen]
    boxes = torch.cat([_moved(rows["boxes"], view, frame) for rows, view in zip(found, seen)])
    scores, classes = (torch.cat([rows[name] for rows in found]) for name in ("scores", "classes"))
    rows = regions.detector.merge_views(boxes, scores, classes, frame.size)
    return regions.to_image(_described(regions, rows, seen, frame), 0, frame.size, image_size)


def _frame(seen: Sequence[_Seen]) -> _Seen:
    """The view whose frame is that of the results."""
    return max((view for view in seen if not view.mirrored), key=lambda view: int(view.size.prod()))


def _described(
    regions: RegionNetwork, rows: dict[str, Tensor], seen: Sequence[_Seen], frame: _Seen
) -> dict[str, Tensor]:
    """Boxes with what every RoI task says of them over all views, as rows."""
    pooled = [regions.pool(view.features, [_moved(rows["boxes"], frame, view)]) for view in seen]
    for index, task in enumerate(regions.tasks):
        raws = []
        for view, regions_of in zip(seen, pooled):
            raw = task(regions_of[regions.pooler_of[index]])
            raws.append(task.unflip(raw) if view.mirrored else raw)
        raw = task.average(raws) if len(raws) > 1 else raws[0]
        rows |= task.decode(raw, rows["boxes"], rows["classes"], rows["image_index"])
    return rows


def _moved(boxes: Tensor, source: _Seen, target: _Seen) -> Tensor:
    """(N, 4) boxes of one view's frame in another's; as they are where both are the same."""
    if source is target:
        return boxes
    boxes = _mirrored(boxes, source.size[1]) if source.mirrored else boxes
    scale = (target.size / source.size).flip(0).to(boxes.dtype)
    boxes = boxes * torch.cat([scale, scale])
    return _mirrored(boxes, target.size[1]) if target.mirrored else boxes


def _mirrored(boxes: Tensor, width: Tensor) -> Tensor:
    x0, y0, x1, y1 = boxes.unbind(dim=1)
    return torch.stack([width - x1, y0, width - x0, y1], dim=1)


def _first(decoded: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value[0] for name, value in decoded.items()}
