"""What lies behind one task's metrics on one dataset: curves, confusions, errors per image.

As files in the folder of an evaluation:
    <dataset>_<task>_curves.csv      class, recall, precision, score: 101 points per class, at a similarity of 0.5
    <dataset>_<task>_confusion.csv   rows are what is there, columns what was detected, background last
    <dataset>_<task>_images.csv      image_id, found, missed, false, f1: the worst image first
"""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.evaluation.coco import CocoResult
from mtl_rcnn.evaluation.coco_scores import Curve
from mtl_rcnn.evaluation.confusion import Confusion, added, confusion
from mtl_rcnn.evaluation.operating_points import OperatingPoint, thresholds_of
from mtl_rcnn.evaluation.results import write_text


@dataclass(frozen=True)
class ImageErrors:
    """One image's objects that were found and missed, and detections that found nothing."""

    image_id: Any
    found: int
    missed: int
    false: int

    @property
    def f1(self) -> float:
        """2 found / (2 found + missed + false): 1 where nothing is there and nothing was detected."""
        errors = self.missed + self.false
        return 2 * self.found / (2 * self.found + errors) if self.found or errors else 1.0


@dataclass(frozen=True)
class Analysis:
    """Of one task on one dataset.

    Attributes:
        curves: class name -> precision over recall.
        points: class name -> best operating point.
        thresholds: class name -> least score of the detections that the confusions and the errors count.
        confusion: of the classes that occur.
        images: all images, the worst first (lowest F1, then most errors, then in the order of the dataset).
    """

    curves: Mapping[str, Curve]
    points: Mapping[str, OperatingPoint]
    thresholds: Mapping[str, float]
    confusion: Confusion
    images: Sequence[ImageErrors]


def analyse(results: Sequence[CocoResult], label_space: LabelSpace, image_numbers: Mapping[Any, int]) -> Analysis:
    """One analysis of results that share no class.

    Args:
        image_numbers: image id -> number in the results' problems.
    """
    names = label_space.classes
    curves, points, thresholds, matrices = {}, {}, {}, []
    counts = {number: [0, 0, 0] for number in image_numbers.values()}
    for result in results:
        own = thresholds_of(result.points, result.matches)
        thresholds |= {names[index]: value for index, value in sorted(own.items())}
        points |= {names[index]: point for index, point in result.points.items()}
        curves |= {names[index]: curve for index, curve in result.scores.curves.items()}
        matrices.append(confusion(result.problem, names, own))
        _count_errors(result, own, counts)
    images = [ImageErrors(image_id, *counts[number]) for image_id, number in image_numbers.items()]
    worst_first = sorted(images, key=lambda image: (image.f1, -image.missed - image.false))
    return Analysis(curves, points, thresholds, added(matrices).occurring(), worst_first)


def write_analysis(folder: Path, dataset: str, task: str, analysis: Analysis) -> list[Path]:
    """Writes the CSV files (see the module) into the folder; returns their paths."""
    curves = [["class", "recall", "precision", "score"]]
    for name, curve in analysis.curves.items():
        points = zip(curve.recall, curve.precision, curve.score)
        curves += [[name, f"{recall:.2f}", f"{precision:.6g}", f"{score:.6g}"] for recall, precision, score in points]
    images = [["image_id", "found", "missed", "false", "f1"]]
    images += [[str(i.image_id), str(i.found), str(i.missed), str(i.false), f"{i.f1:.4f}"] for i in analysis.images]
    tables = {"curves": curves, "confusion": analysis.confusion.rows(), "images": images}
    paths = []
    for name, table in tables.items():
        paths.append(analysis_path(folder, dataset, task, f"{name}.csv"))
        text = io.StringIO()
        csv.writer(text, lineterminator="\n").writerows(table)
        write_text(paths[-1], text.getvalue())
    return paths


def analysis_path(folder: Path, dataset: str, task: str, name: str) -> Path:
    """Where a file about a task on a dataset lies, such as `<folder>/<dataset>_<task>_curves.csv`."""
    return folder / f"{dataset}_{task}_{name}".replace("/", "_")


def _count_errors(result: CocoResult, thresholds: Mapping[int, float], counts: Mapping[int, list[int]]) -> None:
    """Adds found, missed and false to each image's counts."""
    matches = result.matches.above(thresholds)
    found = set(matches.found[matches.found >= 0].tolist())
    for index, image in enumerate(matches.object_images.tolist()):
        counts[image][0 if index in found else 1] += 1
    for image, hit in zip(matches.images.tolist(), matches.found.tolist()):
        counts[image][2] += hit < 0
