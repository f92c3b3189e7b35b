"""A task that lives in somebody else's folder: one Python file, one YAML, no edit here. It trains, is evaluated
and exported."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import NETWORK, TASKS
from toy import Toy

ROOT = Path(__file__).resolve().parents[1]

BRIGHTNESS = '''
"""Brightness: the mean grey value of an image, as a task on the whole image."""

import torch
from mtl_rcnn.data.mapper import read_image
from mtl_rcnn.data.target import Coverage, ImageTarget
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric
from mtl_rcnn.modeling.slots import ImageTask, Output
from torch import nn


class BrightnessTarget(ImageTarget):
    def check(self, record):
        return Coverage(image=self.declared(record) is not False)

    def load(self, record, geometry):
        return None if self.declared(record) is False else torch.tensor(float(read_image(record).mean()) / 255)

    def as_prediction(self, sample):
        return {"brightness": sample["targets"][self.name]}

    def draw(self, canvas, prediction):
        canvas.caption(f"brightness {float(prediction['brightness']):.2f}")


class BrightnessEvaluator(Evaluator):
    headline = "error"

    def rows(self, record, prediction):
        return [{"image_id": record["image_id"], "brightness": float(prediction["brightness"])}]

    def metrics(self, rows):
        truth = {record["image_id"]: float(read_image(record).mean()) / 255 for record in self.records}
        errors = [abs(row["brightness"] - truth[row["image_id"]]) for row in rows]
        return {"error": Metric(sum(errors) / max(len(errors), 1), higher_is_better=False)}


class BrightnessTask(ImageTask):
    target_class, evaluator_class, loss_parts = BrightnessTarget, BrightnessEvaluator, ("l1",)

    def __init__(self, name, label_space, features, *, level):
        super().__init__(name, label_space, features)
        self.level = level
        self.head = nn.Linear(features[level].channels, 1)

    def outputs(self):
        return [Output("brightness", "()", "float32", "mean grey value in 0..1")]

    def forward(self, features):
        return self.head(features[self.level].mean(dim=(2, 3)))[:, 0]

    def losses(self, raw, targets, image_sizes):
        truth = torch.stack([*targets, raw.new_zeros(())])[:-1]
        return {"l1": ((raw - truth).abs().sum(), torch.tensor(float(len(targets))))}

    def decode(self, raw, padded_size):
        return {"brightness": raw}

    def to_image(self, decoded, network_size, image_size):
        return {"brightness": decoded["brightness"]}
'''

YAML = """
# @package tasks.brightness
_target_: brightness_task.BrightnessTask
target: {}
evaluator: {}
level: p2
"""


@pytest.mark.slow
def test_a_task_from_another_folder_trains_evaluates_and_exports(toy: Toy, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    (elsewhere / "configs" / "tasks").mkdir(parents=True)
    (elsewhere / "brightness_task.py").write_text(BRIGHTNESS)
    (elsewhere / "configs" / "tasks" / "brightness.yaml").write_text(YAML)
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    folder = tmp_path / "run"
    train = [
        *("tools/train_net.py", "--trust", "brightness_task", f"hydra.searchpath=[file://{elsewhere}/configs]"),
        *("tasks=[brightness,detection]", "data.root=unused", f"data.train=[{data}]", f"data.val=[{data}]"),
        *(*NETWORK, *TASKS["detection"], f"output_dir={folder}", "device=cpu", "data.workers=0", "threads=1"),
        *("solver.batch_size=2", "solver.max_iter=3", "solver.steps=[0.9]", "solver.warmup_iters=0"),
        *("data.train_augment.resize.short_edge_length=[48]", "data.test_augment.resize.short_edge_length=48"),
        *("tasks.detection.score_thresh=0.9", "solver.eval_period=0", "solver.checkpoint_period=0"),
    ]
    refused = _run(elsewhere, [word for word in train if word not in ("--trust", "brightness_task")])
    assert refused.returncode == 2
    assert "--trust brightness_task" in refused.stderr
    done = _run(elsewhere, train)
    assert done.returncode == 0, done.stderr
    metrics = json.loads((folder / "metrics.json").read_text())
    assert 0 < metrics["toy/brightness/error"] < 100
    export = ["tools/export_model.py", "--trust", "brightness_task", f"run={folder}", "certificate.min_detections=0"]
    done = _run(elsewhere, export)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["outputs"][-1]["task"] == "brightness"
    # Its author wrote no types, so that TorchScript takes the features for a tensor: said with name and line.
    done = _run(elsewhere, [*export, "export.method=script"])
    assert done.returncode != 0
    line = next(i for i, text in enumerate(BRIGHTNESS.splitlines(), 1) if "features[self.level].mean" in text)
    assert "brightness cannot be scripted: " in done.stderr
    assert f"brightness_task.py:{line}; use export.method=trace" in done.stderr
    assert done.stderr.strip().endswith("or leave it out: export.tasks=[detection]")
    done = _run(elsewhere, [*export, "export.method=script", "export.tasks=[detection]"])
    assert done.returncode == 0, done.stderr
    assert json.loads((folder / "manifest.json").read_text())["tasks"] == ["detection"]


def _run(elsewhere: Path, command: list[str]) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONPATH": f"{elsewhere}:{ROOT}"}
    return subprocess.run(
        [sys.executable, "-W", "ignore", *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
