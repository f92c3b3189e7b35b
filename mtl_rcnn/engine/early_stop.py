"""When to end a training that no longer gets better."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_rcnn.evaluation.evaluator import Metric, find_metric


class EarlyStop:
    """Counts the evaluations since a metric was last better than ever before; `patience` of them are enough.

    Args:
        metric: "dataset/task/metric"; whether higher is better, the metric says itself.
        patience: evaluations without improvement after which to stop, at least 1.
        state: see `resume`.
        key: of the configuration, that asks for the metric.
    """

    def __init__(
        self,
        metric: str,
        patience: int,
        state: Mapping[str, Any] | None = None,
        key: str = "solver.early_stop.metric",
    ) -> None:
        self.metric, self.patience, self.key = metric, patience, key
        self.state: dict[str, Any] | None = None
        """Best value so far, its iteration, and the evaluations since then; plain values for the checkpoint."""
        self.resume(state)

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Takes what `state` was when the run was interrupted; that of another metric is not read."""
        self.state = dict(state) if state and state["metric"] == self.metric else None

    @property
    def due(self) -> bool:
        """Whether the training is to end."""
        return self.state is not None and self.state["waited"] >= self.patience

    def update(self, metrics: Mapping[str, Metric], iteration: int) -> None:
        """Takes in an evaluation. Raises ConfigError if there is no such metric."""
        metric = find_metric(metrics, self.metric, self.key)
        if self.state is None or metric.better_than(self.state["value"]):
            self.state = {"metric": self.metric, "value": metric.value, "iteration": iteration, "waited": 0}
            return
        self.state["waited"] += 1

    def reason(self) -> str:
        """Why it is due, in words."""
        state = self.state
        return (
            f"{self.metric} has not been better than {state['value']:.4g}, of iteration {state['iteration']}, for "
            f"{state['waited']} evaluations"
        )
