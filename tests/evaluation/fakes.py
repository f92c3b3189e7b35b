"""A dataset, a network and an evaluator small enough to know every number."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row

LABELS = LabelSpace(({"name": "thing"},))


def records(count: int) -> list[dict[str, Any]]:
    """Ids fall while positions rise, so that sorting by id would show."""
    return [{"image_id": 100 - n, "file_name": f"{n}.jpg", "height": 10, "width": 20} for n in range(count)]


def batches(some: Sequence[Mapping[str, Any]], size: int = 2) -> list[list[dict[str, Any]]]:
    samples = [{"image_id": record["image_id"], "image": torch.zeros(3, 10, 20)} for record in some]
    return [samples[start : start + size] for start in range(0, len(samples), size)]


class FakeNetwork(nn.Module):
    """Gives image i (i mod 3) numbers; its norm layer stays in evaluation mode also while training."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(1, 1)
        self.frozen = nn.BatchNorm1d(1).eval()
        self.modes: list[tuple[bool, bool]] = []

    def forward(self, batch: list[dict[str, Any]]) -> list[dict[str, torch.Tensor]]:
        self.modes.append((self.training, torch.is_grad_enabled()))
        return [
            {"values": sample["image_id"] + self.linear(torch.ones(1)) * 0 + torch.arange(sample["image_id"] % 3)}
            for sample in batch
        ]


class FakeEvaluator(Evaluator):
    """One row per number; the metric is their mean, or 0 with a reason."""

    def rows(self, record: Mapping[str, Any], prediction: Mapping[str, torch.Tensor]) -> list[Row]:
        assert not prediction["values"].requires_grad
        return [{"image_id": record["image_id"], "value": value} for value in prediction["values"].tolist()]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        if not rows:
            return {"error": Metric(0.0, higher_is_better=False, reason="no rows")}
        return {"error": Metric(sum(row["value"] for row in rows) / len(rows), higher_is_better=False)}
