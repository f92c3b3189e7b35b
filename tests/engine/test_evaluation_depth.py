"""tools/evaluate.py on a trained network: reasons only the network can give, pictures, classes, thresholds."""

from __future__ import annotations

import json
from pathlib import Path

import cv2
import pytest
import torch
from omegaconf import DictConfig
from tiny import tiny_config
from toy import Toy, write_toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.diagnosis import untrained
from mtl_rcnn.engine.evaluate import evaluate_checkpoint
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.results import read_metrics, read_thresholds, write_metrics
from mtl_rcnn.export.export import score_thresholds

TASKS = ("detection", "keypoint", "mask")


def train_config(toy: Toy, folder: Path, *overrides: str, labels: str = "null") -> DictConfig:
    """Three iterations; `labels` are the tasks that the training set is said to label."""
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}], tasks: {labels}}}"
    val = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    small = [
        *("solver.batch_size=2", "solver.max_iter=3", "solver.steps=[0.8]", "solver.warmup_iters=0"),
        *("solver.lr=0.005", "solver.log_period=1", "solver.eval_period=0", "solver.checkpoint_period=0"),
        *("data.workers=0", "data.train_augment.resize.short_edge_length=[48]", "device=cpu", "threads=1"),
        *("data.test_augment.resize.short_edge_length=48", "tasks.detection.score_thresh=0.3"),
    ]
    return tiny_config(TASKS, f"data.train=[{data}]", f"data.val=[{val}]", f"output_dir={folder}", *small, *overrides)


def evaluate_config(run: Path, *overrides: str) -> DictConfig:
    return compose("evaluate", [f"run={run}", "device=cpu", "workers=0", *overrides])


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run whose data never labelled masks."""
    root = tmp_path_factory.mktemp("run")
    return train(train_config(write_toy(root / "toy"), root / "run", labels="[detection, keypoint]")).folder


def test_training_leaves_tables_but_no_pictures(run: Path) -> None:
    found = {path.name for path in (run / "evaluation").iterdir()}
    assert found == {f"toy_{task}_{kind}.csv" for task in TASKS for kind in ("curves", "confusion", "images")}


def test_a_head_that_was_never_trained_is_named_and_no_other(run: Path) -> None:
    restored = restore(run)
    weights = restored.model.roi_heads.tasks["mask"].head
    start = [value for name, value in weights.named_parameters() if name.endswith("weight")]
    assert untrained(restored.model, restored.cfg, restored.label_space) == (
        f"still as at the random start, neither loaded nor trained: 'mask' (all {len(start)} weights)"
    )
    with torch.no_grad():
        for weight in start:
            weight += 0.01 * torch.rand_like(weight)
    assert untrained(restored.model, restored.cfg, restored.label_space) is None


def test_the_reason_stands_beside_the_metric(run: Path) -> None:
    metrics = read_metrics(run)
    assert metrics["toy/mask/AP"].value < 1
    assert "neither loaded nor trained: 'mask'" in metrics["toy/mask/AP"].reason


def test_a_score_threshold_above_every_score_is_named_with_the_highest_score(run: Path, tmp_path: Path) -> None:
    state = checkpoints.load(run / "model_0000003.pth")
    state["config"]["tasks"]["detection"]["score_thresh"] = 1.0
    checkpoints.save(tmp_path / "model_0000003.pth", state)

    metrics = evaluate_checkpoint(evaluate_config(tmp_path / "model_0000003.pth", "pictures=false"))

    reason = metrics["toy/detection/AP"].reason
    assert reason.startswith("no detections in 6 images; the score threshold is 1, the highest score is 0.")
    assert "(6 images looked at)" in reason
    stored = json.loads((tmp_path / "evaluation" / "metrics_info.json").read_text())
    assert stored["toy/detection/AP"]["reason"] == reason
    assert restore(tmp_path / "model_0000003.pth").model.roi_heads.detector.score_thresh == 1.0


def test_pictures_can_be_read_and_show_truth_beside_prediction(run: Path, tmp_path: Path) -> None:
    evaluate_checkpoint(evaluate_config(run, f"output_dir={tmp_path}", "worst_images=3"))
    for task in TASKS:
        for kind in ("curves", "confusion", "worst"):
            picture = cv2.imread(str(tmp_path / f"toy_{task}_{kind}.png"))
            assert picture is not None, (task, kind)
            assert picture.std() > 5
    worst = cv2.imread(str(tmp_path / "toy_detection_worst.png"))
    assert worst.shape[1] > 2 * 400, "two drawings beside each other"


def test_classes_of_the_command_line(run: Path, tmp_path: Path) -> None:
    metrics = evaluate_checkpoint(
        evaluate_config(run, f"output_dir={tmp_path}", "classes=[disc,square]", "pictures=false")
    )
    assert {name.split("/", 3)[3] for name in metrics if name.count("/") == 3} == {"disc", "square"}
    assert "none of the classes to score" in metrics["toy/keypoint/AP"].reason
    with pytest.raises(ConfigError, match=r"no class 'disk'; did you mean 'disc'\?"):
        evaluate_checkpoint(evaluate_config(run, f"output_dir={tmp_path}", "classes=[disk]"))


def test_classes_of_a_training_run_are_checked_before_it_trains(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"evaluation\.classes: the network has no class 'figur'"):
        train(train_config(toy, tmp_path / "run", "evaluation.classes=[figur]"))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_the_manifest_gets_the_thresholds_of_this_very_network(run: Path, tmp_path: Path) -> None:
    restored = restore(run)
    expected: dict = {}
    for name, value in json.loads((run / "metrics.json").read_text()).items():
        if "/score_threshold/" in name:
            dataset, task, _, class_name = name.split("/")
            expected.setdefault(dataset, {}).setdefault(task, {})[class_name] = value
    assert score_thresholds(restored) == expected
    assert read_thresholds(run, iteration=2) == {}, "metrics of another iteration are not of this network"
    write_metrics(tmp_path, read_metrics(run))
    assert read_thresholds(tmp_path, iteration=3) == {}, "metrics of an unknown network"
    assert read_thresholds(tmp_path / "nothing", iteration=3) == {}
