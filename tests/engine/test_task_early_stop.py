"""Whole runs whose tasks stop early: what is left, what a resumed one does, and the commands of docs/schedules.md."""

from __future__ import annotations

import re
import shlex
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from pages import ROOT, commands_of, read_page
from test_train import toy_config
from tiny import need_tasks
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import on_the_way
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Metric

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

TASKS = ("detection", "mask")
SCORES = {"detection": [1.0, 2.0, 3.0, 2.0, 3.0, 3.0, 9.0], "mask": [4.0, 3.0, 4.0, 9.0, 9.0, 9.0, 9.0]}
"""After each step, from 1. With a patience of 2, masks stop after 3 and boxes, the last task, after 5."""
HEADS = {"detection": "roi_heads.detector.", "mask": "roi_heads.tasks.mask."}


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Evaluations give `SCORES`."""
    need_tasks(*TASKS)
    step, done = Trainer.run_step, []

    def counted(self: Trainer) -> None:
        done[:] = [self.iter]
        step(self)

    def scores(*_: object, **__: object) -> dict[str, Metric]:
        return {f"toy/{task}/AP": Metric(values[done[0]]) for task, values in SCORES.items()}

    monkeypatch.setattr(Trainer, "run_step", counted)
    monkeypatch.setattr(on_the_way, "evaluate", scores)


def _run(toy: Toy, folder: Path, *options: str) -> Path:
    stops = [f"+solver.task_schedule.{task}.early_stop.patience=2" for task in TASKS]
    lengths = ["solver.max_iter=7", "solver.eval_period=1", "solver.checkpoint_period=1", "checkpoint.keep=9"]
    return train(toy_config(toy, folder, *stops, *lengths, *options, tasks=TASKS)).folder


def _head(path: Path, task: str) -> dict[str, torch.Tensor]:
    return {name: t for name, t in checkpoints.load(path)["model"].items() if name.startswith(HEADS[task])}


def test_every_task_stops_by_itself_its_best_network_is_kept_and_the_last_ends_the_run(
    toy: Toy, tmp_path: Path, scripted: None
) -> None:
    folder = _run(toy, tmp_path / "run")
    numbered = sorted(path.name for path in folder.glob("model_0*.pth"))
    assert numbered == [f"model_{number:07d}.pth" for number in range(1, 6)]
    for task, iteration, value in (("detection", 3, 3.0), ("mask", 1, 4.0)):
        best = checkpoints.load(folder / f"model_best_{task}.pth")
        assert best["best"] == {"metric": f"toy/{task}/AP", "value": value, "iteration": iteration}
        weights = checkpoints.load(folder / f"model_{iteration:07d}.pth")["model"]
        restored = restore(folder / f"model_best_{task}.pth")
        assert restored.iteration == iteration
        assert all(torch.equal(tensor, weights[name]) for name, tensor in restored.model.state_dict().items())
    masks = [_head(folder / name, "mask") for name in numbered]
    same = [all(torch.equal(t, after[name]) for name, t in now.items()) for now, after in pairwise(masks)]
    assert same == [False, False, True, True]
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if "total" in row]
    assert [row["task_weight/mask"] for row in rows] == [1, 1, 1, 0, 0]
    assert ["mask/bce" in row for row in rows] == [True, True, True, False, False]
    log = (folder / "log.txt").read_text()
    assert "mask: iterations 0 to 7, weight 1 at 0, until toy/mask/AP is no better for 2 evaluations" in log
    assert "the task mask stops early after iteration 3: toy/mask/AP has not been better than 4, of iteration 1" in log
    assert checkpoints.load(folder / "model_best.pth")["iteration"] == 3  # solver.best_metric, of the detector


@pytest.mark.parametrize("killed", [1, 4])
def test_a_killed_and_resumed_run_equals_the_uninterrupted_one(
    killed: int, toy: Toy, tmp_path: Path, scripted: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = _run(toy, tmp_path / "whole")
    step = Trainer.run_step

    def interrupted(self: Trainer) -> None:
        if self.iter == killed:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            _run(toy, tmp_path / "halves")
    halves = _run(toy, tmp_path / "halves")
    for name in ("model_0000005.pth", "model_best_mask.pth", "model_best_detection.pth"):
        first, second = (checkpoints.load(folder / name) for folder in (whole, halves))
        assert first["task_schedule"] == second["task_schedule"]
        assert first["best"] == second["best"]
        assert all(torch.equal(tensor, second["model"][key]) for key, tensor in first["model"].items()), name
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(halves / "metrics.jsonl")
    monkeypatch.setattr(Trainer, "run_step", lambda _: pytest.fail("trains again"))
    _run(toy, tmp_path / "halves")  # ended, it stays ended


def test_a_metric_that_does_not_exist_is_told(toy: Toy, tmp_path: Path, scripted: None) -> None:
    option = "+solver.task_schedule.mask.early_stop.metric=toy/mask/APs"
    with pytest.raises(
        ConfigError, match=r"task_schedule\.mask\.early_stop\.metric=toy/mask/APs: .* mean toy/mask/AP\?"
    ):
        _run(toy, tmp_path / "run", option)


PAGE = read_page("schedules.md")
COMMANDS = commands_of(PAGE)


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs(command: str, toy: Toy, tmp_path: Path) -> None:
    """On the toy data, in seven iterations."""
    need_tasks("keypoint", *TASKS)
    words = shlex.split(command)
    if words[1] == "tools/train_net.py":
        compose("train", words[2:])
        options = [re.sub(r"\d{4,}", "3", word) for word in words[2:] if "solver." in word or "balancing" in word]
        train(toy_config(toy, tmp_path / "run", "solver.max_iter=7", *options, "solver.eval_period=3",
                         tasks=(*TASKS, "keypoint")))  # fmt: skip
    else:
        assert (ROOT / words[1]).is_file()
        compose(Path(words[1]).stem, words[2:])


def test_the_page_has_commands() -> None:
    if not PAGE:
        pytest.skip("this copy of the project has no docs")
    assert len(COMMANDS) >= 3
