"""The report of a real run: what training leaves, and what the tool makes of a folder that has lost its data."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny import tiny_config
from toy import write_toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine.report import report_run
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError

TASKS = ("detection", "mask")


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four iterations with two evaluations."""
    root = tmp_path_factory.mktemp("reported")
    toy = write_toy(root / "toy")
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    small = [
        *("solver.batch_size=2", "solver.max_iter=4", "solver.steps=[0.8]", "solver.warmup_iters=0"),
        *("solver.lr=0.005", "solver.log_period=1", "solver.eval_period=2", "solver.checkpoint_period=0"),
        *("data.workers=0", "data.train_augment.resize.short_edge_length=[48]", "device=cpu", "threads=1"),
        *("data.test_augment.resize.short_edge_length=48", "tasks.detection.score_thresh=0.3"),
        *("report.images=3", "evaluation.samples=2", "solver.val_losses=true"),
    ]
    return train(
        tiny_config(TASKS, f"data.train=[{data}]", f"data.val=[{data}]", f"output_dir={root / 'run'}", *small)
    ).folder


def test_training_leaves_a_report_of_everything(run: Path) -> None:
    text = (run / "report.html").read_text()
    metrics = json.loads((run / "metrics.json").read_text())
    assert f"{metrics['toy/detection/AP50']:.3f}" in text or f"{metrics['toy/detection/AP50']:.2f}" in text
    assert len(re.findall(r"<img [^>]*src=\"data:image/jpeg", text)) == 3
    for said in (
        "detection: losses",
        "mask: losses",
        "toy cls",  # a validation loss, beside the training's
        "AP on toy",
        "learning rate",
        "solver.max_iter",
        "Metrics: metrics.json, after 4 iterations.",
        "figure",
        "torch: ",
    ):
        assert said in text, said
    assert not re.findall(r'(?:src|href)="(?!#|data:)', text)


def test_the_label_table_is_kept(run: Path) -> None:
    rows = json.loads((run / "labels.json").read_text())
    assert [(row["dataset"], row["task"], row["images"]) for row in rows] == [("toy", task, 6) for task in TASKS]
    assert "instances labelled" in (run / "report.html").read_text()


def test_tensorboard_gets_the_same_images_at_every_evaluation(run: Path) -> None:
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"images": 0}).Reload()
    tags = events.Tags()["images"]
    assert tags == ["predictions/toy 11", "predictions/toy 14"]
    assert [image.step for image in events.Images(tags[0])] == [2, 4]


def test_the_tool_makes_a_report_of_what_is_left(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "copy"
    shutil.copytree(run, folder, ignore=shutil.ignore_patterns("*.pth", "last_checkpoint", "labels.json"))
    config = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(config.replace(str(run.parent / "toy"), str(tmp_path / "gone")))

    report_run(compose("report", [f"run={folder}", "device=cpu"]))

    text = (folder / "report.html").read_text()
    assert "no predictions: " in text
    assert "no checkpoint in this directory" in text
    assert "the label table was not kept, and the data cannot be read" in text
    assert "detection: losses" in text
    assert f"wrote {folder / 'report.html'}" in capsys.readouterr().out


def test_a_folder_without_a_run_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"no config\.yaml in this folder; expected a run's output_dir"):
        report_run(compose("report", [f"run={tmp_path}"]))
