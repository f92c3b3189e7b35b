"""When to end a training that no longer gets better."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from mtl_rcnn.evaluation.evaluator import Metric, find_metric

logger = logging.getLogger(__name__)


class EarlyStop:
    """Counts the evaluations since a metric was last better than ever before; `patience` of them are enough.

    Args:
        metric: "dataset/task/metric"; whether higher is better, the metric says itself.
        patience: evaluations without improvement after which to stop, at least 1.
        state: what `state` was when the run was interrupted; that of another metric is not read.
    """

    def __init__(self, metric: str, patience: int, state: Mapping[str, Any] | None) -> None:
        self.metric, self.patience = metric, patience
        self.state: dict[str, Any] | None = dict(state) if state and state["metric"] == metric else None
        """Best value so far, its iteration, and the evaluations since then; plain values for the checkpoint."""

    @property
    def due(self) -> bool:
        """Whether the training is to end."""
        return self.state is not None and self.state["waited"] >= self.patience

    def update(self, metrics: Mapping[str, Metric], iteration: int) -> None:
        """Takes in an evaluation. Raises ConfigError if there is no such metric."""
        metric = find_metric(metrics, self.metric, "solver.early_stop.metric")
        if self.state is None or metric.better_than(self.state["value"]):
            self.state = {"metric": self.metric, "value": metric.value, "iteration": iteration, "waited": 0}
            return
        self.state["waited"] += 1
        if self.due:
            logger.info(
                "early stop after iteration %d: %s has not been better than %.4g, of iteration %d, for %d evaluations",
                *(iteration, self.metric, self.state["value"], self.state["iteration"], self.state["waited"]),
            )
