"""Two gloo ranks with two images each train as one rank with four, whatever is labelled where, and stay together over a
run of the tool. No unused-parameter search is needed."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from ddp_worker import PATTERNS
from ranks import ROOT, run_ranks
from tiny import NETWORK, TASKS, need_tasks

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.progress import read_metrics

pytestmark = pytest.mark.slow  # not run once more for each task that is left out


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Of one rank, of rank 0 of two, and of rank 1 of two."""
    need_tasks("detection", "mask", "keypoint")
    folder = tmp_path_factory.mktemp("ddp")
    for world in (1, 2):
        for status, output in run_ranks([str(ROOT / "tests" / "ddp_worker.py"), str(folder)], world):
            assert status == 0, output
    return [torch.load(folder / f"{name}.pt") for name in ("world1_rank0", "world2_rank0", "world2_rank1")]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_two_ranks_train_as_one(pattern: str, results: list[dict[str, Any]]) -> None:
    one, two, other = (result[pattern] for result in results)
    assert two["values"] == pytest.approx(one["values"], rel=1e-6, abs=1e-9)
    assert any(value > 0 for value in one["values"].values()) == (pattern != "no labels anywhere")
    for name, tensor in one["model"].items():
        assert torch.equal(two["model"][name], other["model"][name]), name
        torch.testing.assert_close(two["model"][name], tensor, rtol=1e-6, atol=1e-7, msg=name)


def test_twenty_iterations_of_one_and_of_two_ranks_agree(tmp_path: Path) -> None:
    """GroupNorm and images of one size: nothing depends on who computes what but the order of float32 sums, until a
    proposal lies so close to a threshold of overlap that the last bit decides what it is."""
    need_tasks("detection", "mask", "keypoint")
    scenes = tmp_path / "scenes"
    make = ["datasets/shape_scenes.py", "--out", str(scenes), "--train", "12", "--val", "2", "--size", "96x64"]
    subprocess.run([sys.executable, *make], cwd=ROOT, check=True, capture_output=True, timeout=100)
    folders = {world: tmp_path / f"world{world}" for world in (1, 2)}
    for world, folder in folders.items():
        for status, output in run_ranks(_twenty_iterations(scenes, folder), world):
            assert status == 0, output
    one, two = (checkpoints.load(folder / "model_0000020.pth")["model"] for folder in folders.values())
    start = checkpoints.load(folders[1] / "model_0000001.pth")["model"]
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=0, atol=1e-3, msg=name)
    assert max((one[name] - start[name]).abs().max().item() for name in one) > 1e-2, "it has learned something"
    losses = [[row["total"] for row in read_metrics(folder / "metrics.jsonl")] for folder in folders.values()]
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)
    assert losses[1][:8] == pytest.approx(losses[0][:8], rel=1e-5)


def _twenty_iterations(scenes: Path, folder: Path) -> list[str]:
    """Trains through the tool, on images that are all resized to 64 x 96."""
    tasks = ("detection", "mask", "keypoint")
    return [
        *("tools/train_net.py", f"tasks=[{','.join(tasks)}]", "data=shapes", f"data.root={scenes}", "data.val=[]"),
        *("data.workers=0", "~data.train_augment.resize"),
        "+data.train_augment.fixed={_target_: detectron2.data.transforms.Resize, shape: [64, 96]}",
        *(*NETWORK, *(knob for task in tasks for knob in TASKS[task])),
        *("model.backbone.width=32", "model.backbone.fpn_channels=32"),
        *("model.backbone.norm=GN", "model.backbone.fpn_norm=GN", "device=cpu", "threads=1", f"output_dir={folder}"),
        *("solver.batch_size=4", "solver.max_iter=20", "solver.steps=[0.9]", "solver.warmup_iters=5"),
        *("solver.lr=0.0005", "solver.log_period=1", "solver.checkpoint_period=1", "checkpoint.keep=20"),
        # Every proposal trains the heads: which of two equally good ones is chosen may hang on the last bit.
        *("tasks.detection.rpn.aspect_ratios=[1.0]", "tasks.detection.rpn.nms_thresh=1"),
        *("tasks.detection.rpn.pre_nms_topk=[1000,100]", "tasks.detection.rpn.post_nms_topk=[1000,100]"),
        *("model.regions.batch_size_per_image=1000", "model.regions.positive_fraction=0.5", "report.enabled=false"),
    ]
