"""The data side of a task: how its labels are read, checked, moved with the image, and drawn.

A `Target` lives in loader workers: it is picklable, holds no weights and knows nothing of the network. Three states are
kept apart for every (image, task) and every (instance, task): *labelled*, *labelled and empty*, *absent*.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from mtl_rcnn.errors import ConfigError

if TYPE_CHECKING:
    from mtl_rcnn.data.faults import Fault
    from mtl_rcnn.data.geometry import Geometry
    from mtl_rcnn.data.label_space import LabelSpace
    from mtl_rcnn.visualize.canvas import Canvas

Record = Mapping[str, Any]
"""One image, as Detectron2's dataset dict, from `data.coco`:
    file_name: str, height: int, width: int (pixels), image_id: int | str, dataset: str
    annotations: list of COCO annotations with every raw field kept; `category_id` is the contiguous class index of
        the label space, `bbox` is [x, y, w, h] in pixels, `id` the annotation's id, `iscrowd` 0 or 1
    tasks: tuple of the task names the dataset declares to label, or None ("auto": whatever its annotations carry)
    classes: tuple of the class indices that the dataset labels (others may be visible but are not annotated)
    category_ids: tuple, for each of `classes` the dataset's own category id (results files speak of these)
    vocabularies: dict name -> {the dataset's id of an entry: the network's index of it}; what is not in it, the dataset
        does not label
    whatever else the image's entry holds; fields whose name ends in file_name are paths
"""

Sample = dict[str, Any]
"""What the mapper makes of a record, and what the network gets (a batch is a list of samples):
    image: (3, H, W) uint8 in the model's channel order, network frame (after augmentation)
    height, width: original size in pixels; image_id, file_name, dataset: of the record; sample_index: int,
        position n in the stream
    labelled: dict task name -> bool, whether this image is labelled for the task
    instances: Detectron2 Instances in the network frame with every instance task's `gt_*` fields
    ignore_boxes: (M, 4) XYXY boxes whose inside is neither object nor background (crowds under `crowd: ignore`)
    labelled_classes: (C,) bool, the classes that the image's dataset labels
    targets: dict image task name -> label
Samples made without labels (evaluation) hold only image, height, width, image_id, file_name, dataset and sample_index.
"""

Prediction = dict[str, Tensor]
"""One image's predictions as named tensors in the original image's frame, e.g. boxes (N, 4) XYXY pixels, scores
(N,), classes (N,), masks (N, H, W) bool. Instance tasks share the rows of `boxes`."""


@dataclass(frozen=True)
class GivenBoxes:
    """Boxes of one image that tasks on regions describe as if they had been detected.

    Attributes:
        boxes: (N, 4) float32 XYXY pixels of the original image, inside it, none of them empty.
        classes: (N,) int64 class indices.
    """

    boxes: Tensor
    classes: Tensor


@dataclass(frozen=True)
class Coverage:
    """What one record labels for one task: whether the image counts as labelled, and how many of its instances."""

    image: bool
    instances: int = 0


@dataclass(frozen=True)
class WrittenLabel:
    """A prediction in the form in which a dataset's files hold labels, for one image and one task (`Target.as_label`).

    Attributes:
        image: fields of the image's entry, plain JSON values.
        maps: field of the image's entry, whose name ends in `file_name` -> (H, W) uint8 or uint16 in the image's own
            frame; the caller writes each to a PNG and puts its path into the field.
        annotations: of an instance task, one per row of the prediction: fields of that instance's annotation as plain
            JSON values, or None where the task is not sure of it. The detector's have `bbox` [x, y, w, h] in pixels,
            `category_id` (class index of the label space) and `score`; those of others only what they add.
    """

    image: Mapping[str, Any] = field(default_factory=dict)
    maps: Mapping[str, np.ndarray] = field(default_factory=dict)
    annotations: Sequence[Mapping[str, Any] | None] = ()


class Target(ABC):
    """Reads one task's labels. `name` is the task's name in the configuration.

    Subclasses receive their knobs from the `target:` section of the task's YAML as keyword arguments.

    Attributes:
        covers: what it draws hides the picture, such as a colour per pixel: beside other tasks it gets a panel of its
            own (`visualize.gallery.draw_prediction`).
    """

    covers: ClassVar[bool] = False

    def __init__(self, name: str, label_space: LabelSpace) -> None:
        self.name = name
        self.label_space = label_space

    def declared(self, record: Record) -> bool | None:
        """Whether the record's dataset declares this task; None when it leaves that to its annotations."""
        tasks = record["tasks"]
        return None if tasks is None else self.name in tasks

    @abstractmethod
    def check(self, record: Record) -> Coverage:
        """Validates a record's labels once, before training. Raises DataError naming file, image id and annotation
        id."""

    def faults(self, record: Record) -> Iterator[Fault]:
        """Everything that is wrong with a record's labels for this task, for `mtl_rcnn.check`: what `check` would
        raise, and doubtful labels that training copes with. None by default."""
        return iter(())

    def label_counts(self, record: Record) -> Mapping[str, int]:
        """What the record says of this task by name, as numbers to be summed over a data set and drawn as bars; also
        names of which there are none. Empty, the default, for labels that have no names of their own."""
        return {}

    @abstractmethod
    def as_prediction(self, sample: Sample) -> Prediction:
        """The sample's labels in the form of a prediction (same frame as the sample), for drawing and for checking
        evaluators.

        Instance tasks return rows aligned with `sample["instances"]`.
        """

    def cannot_label(self) -> str | None:
        """Why no prediction of this task can become a label (`as_label`), to stand behind the task's name in a message;
        None if predictions can."""
        if type(self).as_label is Target.as_label:
            return f"does not say how its predictions become labels ({type(self).__name__}.as_label)"
        return None

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel | None:
        """A prediction as labels that `load` reads back, for datasets that lack them (`tools/pseudo_label.py`).

        Optional: without it a task's predictions cannot become labels.

        Args:
            record: the image, which has no labels of this task. `vocabularies` holds all that the written file will
                hold: an index of the network that no id of the record's vocabulary stands for cannot be written (the
                dataset has words of its own, and these are not among them) and is to be left unknown.
            prediction: in the image's own frame, made by the task's `to_label`.
            threshold: least confidence, 0..1, of what becomes a label; the rest stays unknown, where the format can
                say so.

        Returns:
            The label; None where nothing is sure enough, so that the image stays without a label of this task.

        Raises:
            ConfigError: the task does not offer it (`cannot_label`).
        """
        raise ConfigError(f"the task '{self.name}' {self.cannot_label()}; leave it out")

    @abstractmethod
    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """Draws this task's part of a prediction (or of `as_prediction`) on the canvas."""


class InstanceTarget(Target):
    """A target whose labels belong to instances (detector and RoI slots)."""

    @abstractmethod
    def load(
        self, record: Record, annotations: Sequence[Mapping[str, Any]], geometry: Geometry
    ) -> dict[str, Any] | None:
        """Labels of the record's kept annotations, in their order, moved by `geometry`; None if the image is not
        labelled.

        Returns Instances fields of length N = len(annotations), each named `gt_*`. A task other than the detector adds
        `gt_has_<name>`: (N,) bool, False where the instance carries no label of this task; the other fields then hold a
        placeholder that is never read.
        """


class ImageTarget(Target):
    """A target whose labels belong to the whole image (image slot)."""

    @abstractmethod
    def load(self, record: Record, geometry: Geometry) -> Any | None:
        """The image's label, moved by `geometry`; None if the image is not labelled. What it draws from torch's
        generator, the mapper makes a function of the run's seed and the sample."""


def place_of(record: Record, annotation: Mapping[str, Any]) -> str:
    """Where an annotation is, for messages."""
    return f"dataset '{record['dataset']}', image {record['image_id']}, annotation {annotation['id']}"


def valid_mask(samples: Sequence[Sample], name: str) -> Tensor:
    """(B,) bool: which samples of the batch are labelled for task `name`."""
    return torch.tensor([bool(sample["labelled"].get(name, False)) for sample in samples], dtype=torch.bool)
