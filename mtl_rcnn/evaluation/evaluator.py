"""What a task's evaluator gives: rows per image on every rank, metrics with a direction on rank 0."""

from __future__ import annotations

import difflib
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Prediction, Record
from mtl_rcnn.errors import ConfigError

if TYPE_CHECKING:
    from mtl_rcnn.evaluation.analysis import Analysis

Row = dict[str, Any]
"""One line of a results file, e.g. {"image_id", "category_id", "bbox": [x, y, w, h], "score"}. Plain JSON values."""

THRESHOLD = "score_threshold"
"""Metric, per class: the score in 0..1 from which on detections reach the class's highest F1."""


@dataclass(frozen=True)
class Metric:
    """A number, which way is better, and, where it is not a measurement (say no detections), why it is what it is."""

    value: float
    higher_is_better: bool = True
    reason: str | None = None

    def better_than(self, value: float) -> bool:
        """Whether this is strictly better than another value of the same metric."""
        return self.value > value if self.higher_is_better else self.value < value


def find_metric(metrics: Mapping[str, Metric], name: str, key: str) -> Metric:
    """The metric `name` ("dataset/task/metric"). Raises ConfigError naming the `key` that asks for it."""
    if name in metrics:
        return metrics[name]
    close = difflib.get_close_matches(name, metrics, n=1)
    hint = f"did you mean {close[0]}?" if close else f"metrics are {', '.join(m for m in metrics if m.count('/') == 2)}"
    raise ConfigError(f"{key}={name}: no such metric; {hint}")


def class_indices(label_space: LabelSpace, names: Sequence[str], key: str) -> tuple[int, ...]:
    """Class indices of names, in class order. Raises ConfigError naming the `key` that holds an unknown name."""
    known = label_space.index()
    for name in names:
        if name not in known:
            close = difflib.get_close_matches(str(name), known, n=1)
            hint = f"did you mean '{close[0]}'?" if close else f"classes are {', '.join(known)}"
            raise ConfigError(f"{key}: the network has no class '{name}'; {hint}")
    return tuple(sorted({known[name] for name in names}))


@dataclass(frozen=True)
class Scored:
    """Metrics by name, and what lies behind them where a task has such a thing."""

    metrics: Mapping[str, Metric]
    analysis: Analysis | None = None


class Evaluator(ABC):
    """Scores one task on one dataset. Holds no state between images: `rows` runs on every rank, `metrics` on rank 0.

    Args:
        name: the task's name.
        label_space: classes of the network.
        records: all records of the dataset (ground truth).
    """

    headline = "AP"
    """The metric that stands for the task in tables."""
    classes: tuple[int, ...] | None = None
    """Class indices to score, None for all; an evaluator of a task without classes need not heed it."""
    on_truth = False
    """Whether it also wants what the network says of the annotated boxes: `truth_rows` is then called."""

    def __init__(self, name: str, label_space: LabelSpace, records: Sequence[Record]) -> None:
        self.name = name
        self.label_space = label_space
        self.records = records

    @abstractmethod
    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """Results rows of one image, ids as in the dataset's own JSON."""

    def truth_rows(self, record: Record, annotations: Sequence[Mapping[str, Any]], prediction: Prediction) -> list[Row]:
        """Results rows of what the network says of an image's annotated boxes, which stand behind those of `rows`. A
        field that only they have tells them apart.

        Args:
            annotations: the N annotations of the record that are not crowds and have a box with something in it.
            prediction: its N rows are theirs, the scores are one.
        """
        raise NotImplementedError(f"{type(self).__name__} wants annotated boxes (on_truth), but has no truth_rows")

    @abstractmethod
    def metrics(self, rows: Sequence[Row]) -> Mapping[str, Metric]:
        """Metrics by name (`AP`, `AP50`, `AP/<class>` ...) of all rows of the dataset. Never nan."""

    def files(self, rows: Sequence[Row]) -> Mapping[str, bytes]:
        """The rows in other forms that the task's community reads, beside the JSON list: ending of a file's name ->
        content. None by default."""
        return {}

    def score(self, rows: Sequence[Row]) -> Scored:
        """The metrics, and the analysis behind them if the task has one."""
        return Scored(self.metrics(rows))


def instance_rows(record: Record, prediction: Prediction, field: str, values: Sequence[Any]) -> list[Row]:
    """Results rows of one image's detections: image id, the dataset's own category id, score, and each one's value.

    A detection whose value is None, or of a class that the dataset does not have, has no row.
    """
    rows = []
    for class_index, score, value in zip(prediction["classes"].tolist(), prediction["scores"].tolist(), values):
        category_id = dataset_category_id(record, class_index)
        if value is not None and category_id is not None:
            rows.append({"image_id": record["image_id"], "category_id": category_id, field: value, "score": score})
    return rows


def dataset_category_id(record: Record, class_index: int) -> int | None:
    """The dataset's own category id of a class of the network, None if the dataset has no such category.

    A record's `category_ids` stand beside its `classes`. Without them class indices are the category ids.
    """
    if record.get("category_ids") is None:
        return class_index
    classes = record["classes"]
    return record["category_ids"][classes.index(class_index)] if class_index in classes else None
