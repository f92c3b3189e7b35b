"""The predictor: images of any source in, typed results out, with constant memory."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from mtl_rcnn.data.target import Prediction, Sample, Target
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.restore import Restored
from mtl_rcnn.errors import ConfigError, DataError, UnreadableImageError
from mtl_rcnn.evaluation.progress import Progress
from mtl_rcnn.predict.ahead import in_threads, prefetched
from mtl_rcnn.predict.network import load_network
from mtl_rcnn.predict.result import Result
from mtl_rcnn.predict.sources import Item, Source, open_source
from mtl_rcnn.visualize.gallery import draw_prediction, drawing_order

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Skipped:
    """An image that could not be read, and why."""

    name: str
    reason: str


_Read = tuple[Item, np.ndarray, Sample]
"""An image of the stream, its pixels, and what the network takes of it."""


class Predictor:
    """A network that takes images in any form.

        predictor = Predictor("outputs/demo", tasks=["detection"], score_thresh=0.5, batch_size=8)
        for result in predictor("photos/"):
            print(result.name, result.boxes, result.class_names)

    Images are decoded and resized by threads, a few ahead of the network; results come one by one in the order of the
    images, and nothing is kept of them. A batch is padded to its largest image, as in training.

    Args:
        source: see `predict.network.load_network`.
        device: see there.
        tasks: names of the tasks that are wanted; the heads of others are not computed. None: all.
        score_thresh: least score of a detection; None: the network's own.
        batch_size: images that go through the network together.
        workers: threads that decode; 0 decodes between batches. With threads, a given iterable is advanced in one.
        on_error: of an image that cannot be read: "raise", after the results of all images before it; or "skip": it
            is logged and named in `skipped`.
        channel_order: of arrays that are given, "RGB", or "BGR" as OpenCV's. Files and Pillow images need none.
        progress: shows how far it is, with the time to go.
        tta: test-time augmentation, such as {"scales": [640, 800, 960], "flip": True}; a batch then saves nothing.

    Attributes:
        skipped: images left out since the predictor was made.
        cfg, label_space: of the network.
        targets: of the chosen tasks, which draw.

    Raises:
        MtlRcnnError: there is no such network, or it lacks a task; a setting out of range.
    """

    def __init__(
        self,
        source: str | Path | Restored,
        device: str = "auto",
        tasks: Sequence[str] | None = None,
        score_thresh: float | None = None,
        batch_size: int = 1,
        workers: int = 2,
        on_error: str = "raise",
        channel_order: str = "RGB",
        progress: bool = False,
        tta: Mapping[str, Any] | None = None,
    ) -> None:
        _check(batch_size, workers, on_error, channel_order)
        self._network = load_network(source, device, tasks, tta)
        self.score_thresh = score_thresh
        self.batch_size = batch_size
        self.workers = workers
        self.on_error = on_error
        self.channel_order = channel_order
        self.progress = progress
        self.skipped: list[Skipped] = []
        self.cfg, self.label_space = self._network.cfg, self._network.label_space
        targets = build_targets(self.cfg, self.label_space)
        self.targets: dict[str, Target] = {name: targets[name] for name in self._network.tasks}

    def __call__(self, source: Any, limit: int | None = None) -> Iterator[Result]:
        """Results of an image, a list, a folder, a pattern, a video or an iterable (`predict.sources.open_source`).

        Args:
            source: what to predict on.
            limit: only the first so many images.

        Raises:
            DataError: at once, where there is nothing to predict on.
            UnreadableImageError: while iterating, on an image that cannot be read (`on_error`).
        """
        return self._results(open_source(source, self.channel_order), limit)

    def one(self, image: Any) -> Result:
        """The result of one image: a path, a Pillow image or an (H, W, 3) uint8 array in `channel_order`.

        Raises:
            DataError: it cannot be read, or is not one image.
        """
        items = list(islice(open_source(image, self.channel_order).items, 2))
        if len(items) != 1:
            raise DataError(f"expected one image, got {image}; iterate over predictor(source) for many")
        read = self._read(items[0])
        if isinstance(read, Skipped):
            raise UnreadableImageError(read.reason)
        return self._run([read])[0]

    def confident(self, result: Result, threshold: float) -> Prediction:
        """The outputs with the detections of at least this score; what is no row of a detection stays."""
        return self._above(result.outputs, threshold)

    def draw(self, result: Result, threshold: float = 0.0, scale: float | None = None) -> np.ndarray:
        """(H', W', 3) uint8 RGB: the image with the predictions of the chosen tasks of at least this score, and a panel
        for each task that covers it.

        Args:
            result: of this predictor.
            threshold: least score that is drawn.
            scale: pixels of the drawing per pixel of the image; None enlarges small images.
        """
        shown = self.confident(result, threshold)
        return draw_prediction(result.image, shown, drawing_order(self.targets), result.classes, scale=scale)

    def _results(self, source: Source, limit: int | None) -> Iterator[Result]:
        counts = [number for number in (source.total, limit) if number is not None]
        ahead = self.batch_size + self.workers if self.workers else 0
        items = prefetched(islice(source.items, limit), ahead)
        batch: list[_Read] = []
        with Progress("predicting", min(counts, default=None), enabled=self.progress) as progress:
            for read in in_threads(self._read, items, self.workers, ahead):
                if isinstance(read, Skipped):
                    if self.on_error == "raise":
                        yield from self._run(batch)  # what was read before is not lost
                        raise UnreadableImageError(f"{read.reason}; replace it, or leave it out with on_error=skip")
                    self._leave_out(read)
                    progress.advance(1)
                    continue
                batch.append(read)
                if len(batch) == self.batch_size:
                    yield from self._run(batch)
                    progress.advance(len(batch))
                    batch = []
            yield from self._run(batch)
            progress.advance(len(batch))

    def _read(self, item: Item) -> _Read | Skipped:
        try:
            image = item.read()
        except DataError as error:
            return Skipped(item.name, str(error))
        return item, image, self._network.prepare(image)

    def _run(self, reads: Sequence[_Read]) -> list[Result]:
        predictions = self._network.run([sample for _, _, sample in reads]) if reads else []
        classes = self.label_space.classes
        return [
            Result(item.name, item.path, item.frame, image, self._above(prediction, self.score_thresh), classes)
            for (item, image, _), prediction in zip(reads, predictions, strict=True)
        ]

    def _above(self, prediction: Prediction, threshold: float | None) -> Prediction:
        if threshold is None or "scores" not in prediction:
            return prediction
        keep = prediction["scores"] >= threshold
        rows = self._network.row_outputs
        return {name: value[keep] if name in rows else value for name, value in prediction.items()}

    def _leave_out(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        logger.warning("left out unreadable image number %d: %s", len(self.skipped), skipped.reason)


def _check(batch_size: int, workers: int, on_error: str, channel_order: str) -> None:
    if batch_size < 1 or workers < 0:
        raise ConfigError(f"batch_size={batch_size}, workers={workers}: expected at least 1 and at least 0")
    if on_error not in ("raise", "skip"):
        raise ConfigError(f"on_error={on_error}: expected raise or skip")
    if channel_order not in ("RGB", "BGR"):
        raise ConfigError(f"channel_order={channel_order}: expected RGB or BGR")
