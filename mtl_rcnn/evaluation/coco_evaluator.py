"""The evaluator of tasks whose results are COCO rows: the task says how to look at them, the rest is here."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from mtl_rcnn.evaluation.analysis import analyse
from mtl_rcnn.evaluation.coco import CocoResult, coco_result, nothing_to_score
from mtl_rcnn.evaluation.coco_truth import number_images
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row, Scored


@dataclass(frozen=True)
class View:
    """A COCO score type, the classes it is for (None: all), and for "keypoints" the (K,) sigmas."""

    iou_type: str
    classes: tuple[int, ...] | None = None
    sigmas: tuple[float, ...] | None = None


class CocoEvaluator(Evaluator):
    """AP, AR, F1 and their like, over all classes and per class (see `coco_metrics`), and the analysis behind them."""

    @abstractmethod
    def views(self) -> Sequence[View]:
        """How to score the rows. Several views share no class; the task's metrics are then the views' means."""

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """In percent; names as in `coco_metrics`."""
        return self._combined(self._results(rows))

    def score(self, rows: Sequence[Row]) -> Scored:
        """Metrics, curves, confusions and errors per image; no analysis where there is no image or no class."""
        results = self._results(rows)
        metrics = self._combined(results)
        if not results or not self.records:
            return Scored(metrics)
        return Scored(metrics, analyse(results, self.label_space, number_images(self.records)))

    def _results(self, rows: Sequence[Row]) -> list[CocoResult]:
        wanted = set(range(len(self.label_space.classes)) if self.classes is None else self.classes)
        results = []
        for view in self.views():
            chosen = sorted(wanted if view.classes is None else wanted.intersection(view.classes))
            if chosen:
                result = coco_result(
                    self.records, self.label_space, rows, view.iou_type, classes=chosen, sigmas=view.sigmas
                )
                results.append(result)
        return results

    def _combined(self, results: Sequence[CocoResult]) -> dict[str, Metric]:
        if not results:
            return nothing_to_score(f"none of the classes to score is one of the task '{self.name}'")
        if len(results) == 1:
            return results[0].metrics
        metrics = _means([result.metrics for result in results])
        for result in results:
            metrics |= _of_one_class(result) | {name: m for name, m in result.metrics.items() if "/" in name}
        return metrics


def _of_one_class(result: CocoResult) -> dict[str, Metric]:
    """The metrics over all classes under the name of the class, where there is just one."""
    names = [category["name"] for category in result.problem.truth["categories"]]
    if len(names) > 1:
        return {}
    return {f"{name}/{names[0]}": metric for name, metric in result.metrics.items() if "/" not in name}


def _means(parts: Sequence[dict[str, Metric]]) -> dict[str, Metric]:
    """Means of the metrics over all classes that every part has, with every part's reasons."""
    shared = [name for name in parts[0] if "/" not in name and all(name in part for part in parts)]
    return {
        name: Metric(
            float(np.mean([part[name].value for part in parts])),
            parts[0][name].higher_is_better,
            "; ".join(dict.fromkeys(reason for part in parts if (reason := part[name].reason))) or None,
        )
        for name in shared
    }
