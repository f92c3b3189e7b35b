"""From a record to a sample: the image is read and augmented once, then every target follows the same geometry."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from detectron2.structures import Instances
from PIL import UnidentifiedImageError

from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.image_file import strict_decoding
from mtl_rcnn.data.target import ImageTarget, InstanceTarget, Record, Sample, Target
from mtl_rcnn.errors import ConfigError, UnreadableImageError

_DETECTOR_BOXES = "gt_boxes"
_LABELS = 1
"""Distinguishes draws for a sample's labels from those for its augmentation."""


class Mapper:
    """Makes samples. Picklable, without state: a sample is a function of (seed, sample index, attempt, record).

    Args:
        targets: task name -> how its labels are read.
        augmentations: applied in order.
        input_format: channel order of the model's images, "BGR" or "RGB". Augmentations always see RGB.
        crowd: what regions annotated as crowds are: "background" (as any other pixel), or "ignore" (neither object nor
            background).
        on_error: "raise", or "skip": whether the loaders may replace unreadable images.
        seed: of the run.
        training: False makes samples without labels (unless `labels`).
        labels: whether labels are loaded; None means as `training`.
    """

    def __init__(
        self,
        targets: Mapping[str, Target],
        augmentations: Sequence[T.Augmentation | T.Transform],
        input_format: str = "BGR",
        crowd: str = "background",
        on_error: str = "raise",
        seed: int = 0,
        training: bool = True,
        labels: bool | None = None,
    ) -> None:
        _check_choice("model.input_format", input_format, ("BGR", "RGB"))
        _check_choice("data.crowd", crowd, ("background", "ignore"))
        _check_choice("data.on_error", on_error, ("raise", "skip"))
        self.targets = dict(targets)
        self.augmentations = T.AugmentationList(list(augmentations))
        self.input_format = input_format
        self.crowd = crowd
        self.on_error = on_error
        self.seed = seed
        self.labels = training if labels is None else labels

    def __call__(self, record: Record, sample_index: int, attempt: int = 0) -> Sample:
        """The sample of a record, as `Sample` describes it.

        Args:
            record: the image and its labels.
            sample_index: position n in the run's stream of samples (or in the dataset, in evaluation).
            attempt: how many records before this one could not be read for sample n.

        Raises:
            UnreadableImageError: the image file is missing, damaged, or of another size than the record says.
            DataError: a fault in the record's labels.
        """
        image, geometry = self._augment(record, sample_index, attempt)
        sample: Sample = {key: record[key] for key in ("height", "width", "image_id", "file_name", "dataset")}
        sample["sample_index"] = sample_index
        if self.input_format == "BGR":
            image = image[:, :, ::-1]
        sample["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.labels:
            with seeded(self.seed, sample_index, attempt, _LABELS):  # what a label draws is the sample's own, too
                self._add_labels(sample, record, geometry)
        return sample

    def _augment(self, record: Record, sample_index: int, attempt: int) -> tuple[np.ndarray, Geometry]:
        boxes = [entry["bbox"] for entry in record["annotations"] if "bbox" in entry and not entry["iscrowd"]]
        augmented = T.AugInput(read_image(record), boxes=_corners(boxes))
        with seeded(self.seed, sample_index, attempt):
            transforms = self.augmentations(augmented)
        height, width = augmented.image.shape[:2]
        return augmented.image, Geometry(transforms, height, width)

    def _add_labels(self, sample: Sample, record: Record, geometry: Geometry) -> None:
        objects = [entry for entry in record["annotations"] if not entry["iscrowd"]]
        instances = Instances((geometry.height, geometry.width))
        sample["labelled"], sample["targets"] = {}, {}
        for name, target in self.targets.items():
            label = _load(target, record, objects, geometry)
            sample["labelled"][name] = label is not None
            if label is None:
                continue
            if isinstance(target, ImageTarget):
                sample["targets"][name] = label
            else:
                _add_fields(instances, label, name)
        if instances.has(_DETECTOR_BOXES):
            # A crop may leave nothing of an object: it is gone for every task together.
            instances = instances[instances.get(_DETECTOR_BOXES).nonempty()]
        sample["instances"] = instances
        sample["ignore_boxes"] = self._ignore_boxes(record, geometry)
        sample["labelled_classes"] = self._labelled_classes(record)

    def _ignore_boxes(self, record: Record, geometry: Geometry) -> torch.Tensor:
        crowds = [e["bbox"] for e in record["annotations"] if e["iscrowd"] and "bbox" in e and self.crowd == "ignore"]
        boxes = geometry.boxes(_corners(crowds))
        seen = (boxes[:, 2] > boxes[:, 0]) & (boxes[:, 3] > boxes[:, 1])
        return torch.as_tensor(boxes[seen], dtype=torch.float32)

    def _labelled_classes(self, record: Record) -> torch.Tensor:
        number = max((len(target.label_space.categories) for target in self.targets.values()), default=0)
        labelled = torch.zeros(number, dtype=torch.bool)
        labelled[[index for index in record["classes"] if index < number]] = True
        return labelled


def read_image(record: Record) -> np.ndarray:
    """The record's image, (H, W, 3) uint8 RGB, turned upright as its EXIF orientation says.

    Raises:
        UnreadableImageError: the file is missing, damaged, or of another size than the record says.
    """
    named = f"{record['file_name']} (dataset {record['dataset']!r}, image id {record['image_id']})"
    try:
        with strict_decoding():
            image = detection_utils.read_image(record["file_name"], format="RGB")
    except Exception as error:  # decoders raise anything on damaged files, from SyntaxError to struct.error
        raise _unreadable(record["file_name"], named, error) from error
    height, width = image.shape[:2]
    if (height, width) != (record["height"], record["width"]):
        raise UnreadableImageError(
            f"{named}: the image is {width} x {height} pixels (width x height, turned as its EXIF orientation says); "
            f"its annotation file says {record['width']} x {record['height']}; correct width and height there, or save "
            "the image in that size without an EXIF orientation, or leave it out with data.on_error=skip",
            "image of another size",
        )
    return image


def _unreadable(path: str, named: str, error: Exception) -> UnreadableImageError:
    """What an image's decoder ran into, in words that say what to do."""
    if isinstance(error, FileNotFoundError):
        text = f"{named}: no such image file; correct the dataset's 'images' or data.root"
        return UnreadableImageError(text, "image file missing")
    kind, what = "damaged image", str(error)
    if os.path.isdir(path):
        kind, what = "folder in place of an image", "it is a folder"
    elif isinstance(error, UnidentifiedImageError):
        empty = os.path.getsize(path) == 0
        kind = "empty image file" if empty else kind
        what = "the file is empty" if empty else "its format is unknown"
    return UnreadableImageError(
        f"{named}: the image cannot be decoded ({what}); replace the file, or leave it out with data.on_error=skip",
        kind,
    )


@contextmanager
def seeded(*key: int) -> Iterator[None]:
    """Draws of Python, NumPy and torch (CPU) inside are a function of `key`; outside the generators go on as before.

    The global generators, because Detectron2's augmentations draw from them.
    """
    python, legacy, pytorch = random.getstate(), np.random.get_state(), torch.get_rng_state()  # noqa: NPY002
    words = np.random.SeedSequence(key).generate_state(8)
    random.seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words[2:6])  # noqa: NPY002
    # Not torch.manual_seed: that would also reseed the accelerators, whose states are not restored here.
    torch.default_generator.manual_seed(int(words[6]) << 32 | int(words[7]))
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(legacy)  # noqa: NPY002
        torch.set_rng_state(pytorch)


def _load(target: Target, record: Record, objects: Sequence[Mapping[str, Any]], geometry: Geometry) -> Any | None:
    if isinstance(target, InstanceTarget):
        return target.load(record, objects, geometry)
    if isinstance(target, ImageTarget):
        return target.load(record, geometry)
    raise TypeError(f"{type(target).__name__} is neither an InstanceTarget nor an ImageTarget")


def _add_fields(instances: Instances, label: Mapping[str, Any], name: str) -> None:
    for key, value in label.items():
        if instances.has(key):
            raise TypeError(f"two instance targets give the field {key!r}, the second is {name!r}")
        instances.set(key, value)


def _corners(boxes: Sequence[Sequence[float]]) -> np.ndarray:
    """[x, y, w, h] boxes -> (N, 4) XYXY."""
    corners = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    corners[:, 2:] += corners[:, :2]
    return corners


def _check_choice(key: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise ConfigError(f"{key}={value}: expected {' or '.join(choices)}")
