"""The command line tools, one after the other, as a user runs them; and a killed two-rank run that resumes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ranks import ROOT, run_ranks
from tiny import NETWORK, TASKS, available_tasks
from toy import Toy

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.progress import read_metrics


def train_command(toy: Toy, folder: Path, *overrides: str) -> list[str]:
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    tasks = available_tasks()
    return [
        *("tools/train_net.py", f"tasks=[{','.join(tasks)}]", "data.root=unused", f"data.train=[{data}]"),
        *(f"data.val=[{data}]", *NETWORK, *(knob for task in tasks for knob in TASKS.get(task, []))),
        *(f"output_dir={folder}", "device=cpu", "data.workers=0", "threads=1", "solver.steps=[0.9]"),
        *("solver.batch_size=2", "solver.max_iter=4", "solver.warmup_iters=0", "solver.lr=0.005"),
        *("data.train_augment.resize.short_edge_length=[48]", "data.test_augment.resize.short_edge_length=48"),
        *("solver.eval_period=0", "solver.checkpoint_period=2", "solver.log_period=1", *overrides),
    ]


def run(*command: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", *command], cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_train_evaluate_export_predict_and_look(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    said = run(*train_command(toy, folder, "tasks.detection.score_thresh=0.3"))
    assert "iter 4/4" in said
    trained = json.loads((folder / "metrics.json").read_text())
    run("tools/evaluate.py", f"run={folder}", "device=cpu", "workers=0")
    assert json.loads((folder / "evaluation" / "metrics.json").read_text()) == trained
    results = folder / "predictions" / "toy_detection.json"
    scored = [
        "tools/evaluate.py",
        f"run={folder}",
        f"+results.detection={results}",
        f"output_dir={tmp_path / 'scored'}",
    ]
    run(*scored, "device=cpu", "workers=0")
    again = json.loads((tmp_path / "scored" / "metrics.json").read_text())
    assert again == {name: value for name, value in trained.items() if name.startswith("toy/detection/")}
    run("tools/export_model.py", f"run={folder}", "certificate.min_detections=0")
    assert {"model.ts", "manifest.json", "runtime.py"} <= {path.name for path in folder.iterdir()}
    subset = tmp_path / "subset"
    chosen = [
        "export.method=script",
        "export.tasks=[detection]",
        f"output_dir={subset}",
        "certificate.min_detections=0",
    ]
    assert "batch of three sizes" in run("tools/export_model.py", f"run={folder}", *chosen)
    run("tools/predict.py", f"network={subset / 'model.ts'}", f"input={toy.images}", f"output_dir={subset / 'out'}")
    for network in (folder / "model.ts", folder / "model_best.pth"):
        out = tmp_path / f"predicted_{network.suffix[1:]}"
        run("tools/predict.py", f"network={network}", f"input={toy.images}", f"output_dir={out}", "score_threshold=0")
        assert len(list((out / "drawings").iterdir())) == 6
        assert (out / "predictions" / "images_detection.json").is_file()
    visualize = [word for word in train_command(toy, folder)[1:] if not word.startswith("output_dir")]
    run("tools/visualize_data.py", *visualize, "number=4", f"picture={tmp_path / 'data.png'}")
    assert (tmp_path / "data.png").stat().st_size > 1000


@pytest.mark.slow
def test_a_killed_run_of_two_ranks_resumes_and_equals_the_uninterrupted_one(toy: Toy, tmp_path: Path) -> None:
    quiet = ["data.val=[]", "solver.max_iter=8", "solver.batch_size=4"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands = [train_command(toy, folder, *quiet) for folder in (whole, killed)]
    _check_killed_equals_whole(commands, (whole, killed), first_checkpoint=2, last=8)


@pytest.mark.slow
def test_a_killed_run_on_real_images_resumes_and_equals_the_uninterrupted_one(coco_mini: Path, tmp_path: Path) -> None:
    tasks = [name for name in ("detection", "mask", "keypoint") if name in available_tasks()]
    knobs = [knob for task in tasks for knob in TASKS.get(task, [])]
    small = [
        *(
            "experiment=coco_mini",
            f"tasks=[{','.join(tasks)}]",
            f"data.root={coco_mini}",
            "device=cpu",
            *NETWORK,
            *knobs,
        ),
        *("data.train_augment.resize.short_edge_length=[96]", "data.train_augment.resize.max_size=160"),
        *(
            "data.test_augment.resize.short_edge_length=96",
            "data.workers=0",
            "threads=1",
            "solver.checkpoint_period=10",
        ),
    ]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands = [["tools/train_net.py", *small, f"output_dir={folder}"] for folder in (whole, killed)]
    _check_killed_equals_whole(commands, (whole, killed), first_checkpoint=10, last=50)
    metrics = [(folder / "metrics.json").read_text() for folder in (whole, killed)]
    assert metrics[0] == metrics[1]
    assert "coco_2017_val/detection/AP" in metrics[0]


@pytest.mark.slow
def test_a_diverged_run_ends_all_ranks_with_one_message(toy: Toy, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    diverging = ["data.val=[]", "solver.lr=1e12", "solver.batch_size=4", "solver.max_iter=20"]
    results = run_ranks(train_command(toy, folder, *diverging), world=2, timeout=120)
    assert all(status != 0 for status, _ in results)
    said = "".join(output for _, output in results)
    assert said.count("\nerror on rank") == 1, said
    assert "images: toy/" in said
    (path, *_) = (folder / "failures").glob("iteration_*_rank_*.pt")
    assert str(path.parent) in said


def _check_killed_equals_whole(
    commands: list[list[str]], folders: tuple[Path, Path], first_checkpoint: int, last: int
) -> None:
    """Runs one command on two ranks; kills the other after its first checkpoint and starts it again; compares all."""
    whole, killed = folders
    for status, output in run_ranks(commands[0], world=2):
        assert status == 0, output
    _kill_after_first_checkpoint(commands[1], killed / f"model_{first_checkpoint:07d}.pth")
    assert not (killed / f"model_{last:07d}.pth").exists()
    for status, output in run_ranks(commands[1], world=2):
        assert status == 0, output
    assert "resuming from" in (killed / "log.txt").read_text()
    first, second = (checkpoints.load(folder / f"model_{last:07d}.pth") for folder in folders)
    assert all(torch.equal(value, second["model"][name]) for name, value in first["model"].items())
    momentum = [state["optimizer"]["state"] for state in (first, second)]
    assert all(torch.equal(momentum[0][i]["momentum_buffer"], momentum[1][i]["momentum_buffer"]) for i in momentum[0])
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(killed / "metrics.jsonl")


def _kill_after_first_checkpoint(command: list[str], checkpoint: Path) -> None:
    """Starts two ranks through torchrun and kills all of them, as a power cut would, once a checkpoint exists."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", *command]
    process = subprocess.Popen(
        torchrun, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
    )
    deadline = time.monotonic() + 240
    while not checkpoint.exists():
        assert process.poll() is None, "the run ended before its first checkpoint"
        assert time.monotonic() < deadline, "no checkpoint in time"
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
