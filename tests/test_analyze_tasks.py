"""The tool that analyses a checkpoint's tasks: planted conflicts are said, files hold what is said, nothing changes."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch
from omegaconf import DictConfig
from PIL import Image
from test_train import toy_config
from tiny import need_tasks
from torch import Tensor
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine import analyze_tasks as tool
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import CheckpointError, ConfigError, DataError
from mtl_rcnn.modeling.slots import ImageTask

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

TASKS = ("depth", "image_label", "semantic")
FILES = {"report.txt", "cosines.csv", "cosines.png", "gradients.csv"}


def config(run: Path, folder: Path, *overrides: str) -> DictConfig:
    return compose("analyze_tasks", [f"run={run}", f"output_dir={folder}", "device=cpu", "workers=0", *overrides])


def trained(toy: Toy, folder: Path, *overrides: str, tasks: tuple[str, ...] = TASKS) -> Path:
    """A run of two steps."""
    options = ["solver.max_iter=2", "solver.steps=[]", "data.val=[]", "solver.warmup_iters=0", *overrides]
    return train(toy_config(toy, folder, *options, tasks=tasks)).folder


def table(path: Path) -> list[dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def test_planted_conflicts_are_said_and_nothing_changes(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    need_tasks(*TASKS)
    run, out = trained(toy, tmp_path / "run"), tmp_path / "out"
    kept: list[Restored] = []

    def restored(*given: object) -> Restored:
        """The run's network, whose first task now wants the opposite of what the others want."""
        kept.append(restore(*given))
        for task, sign in zip(kept[0].model.tasks(), (-1, 1, 1)):
            _want(monkeypatch, task, sign)
        return kept[0]

    monkeypatch.setattr(tool, "restore", restored)
    pairs = tool.analyze_tasks(config(run, out, "batches=8"))
    assert {(pair.first, pair.second): pair.verdict for pair in pairs} == {
        ("depth", "image_label"): "conflict",
        ("depth", "semantic"): "conflict",
        ("image_label", "semantic"): "agree",
    }
    lines = (out / "report.txt").read_text().splitlines()
    count = next(pair.batches for pair in pairs if pair.second == "semantic")
    assert f"depth and semantic conflict: mean cosine -1 [-1, -1], negative in {count} of {count} batches" in lines
    assert [line for line in lines if line.startswith("image_label and semantic agree: mean cosine 0.")]
    assert {path.name for path in out.iterdir()} == FILES  # the training was not analysed: there are no curves
    weights = kept[0].model.state_dict()
    before = checkpoints.load(run / "model_0000002.pth")["model"]
    assert all(torch.equal(tensor, weights[name]) for name, tensor in before.items())


def _want(monkeypatch: pytest.MonkeyPatch, task: ImageTask, sign: int) -> None:
    """Makes a task a function of the features without weights: their sum, or its negative."""

    def losses(raw: Tensor, targets: list[object], sizes: object) -> dict[str, tuple[Tensor, Tensor]]:
        (part,) = task.loss_parts
        return {part: (sign * raw.sum(), torch.tensor(float(len(targets))))}

    monkeypatch.setattr(task, "forward", lambda features: features["p2"].flatten(1))
    monkeypatch.setattr(type(task), "losses", lambda self, *given: losses(*given))


def test_tables_hold_every_batch_and_are_the_same_each_time(toy: Toy, tmp_path: Path) -> None:
    need_tasks(*TASKS)
    run = trained(toy, tmp_path / "run", "analysis.every=1")
    for name in ("first", "second"):
        pairs = tool.analyze_tasks(config(run, tmp_path / name, "batches=6", "images_per_batch=1"))
    first, second = tmp_path / "first", tmp_path / "second"
    assert {path.name for path in first.iterdir()} == {*FILES, "curves.png"}
    for name in ("cosines.csv", "gradients.csv"):
        assert (first / name).read_bytes() == (second / name).read_bytes()
    for name in ("cosines.png", "curves.png"):
        assert min(Image.open(first / name).size) > 200
    rows = table(first / "gradients.csv")
    assert [row["batch"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    labelled = [row["grad_norm/image_label"] != "" for row in rows]
    assert labelled.count(False) == 1  # image 16 has no words
    for pair, said in zip(pairs, table(first / "cosines.csv")):
        cells = [row[f"cosine/{pair.first}/{pair.second}"] for row in rows]
        values = [float(cell) for cell in cells if cell]
        assert (said["first"], said["second"], said["verdict"]) == (pair.first, pair.second, pair.verdict)
        assert int(said["batches"]) == len(values) == pair.batches
        assert float(said["mean_cosine"]) == pytest.approx(sum(values) / len(values), rel=1e-4)
        assert int(said["negative"]) == sum(value < 0 for value in values)
    costs = (first / "report.txt").read_text().splitlines()[-4:]
    assert [line.split()[0] for line in costs] == ["trunk", *TASKS]


def test_the_log_of_a_run_is_read_back(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(
        '{"iteration": 2, "total": 1.0}\n'
        '{"iteration": 2, "analysis/grad_norm/a": 0.5, "analysis/mib/a": 3.0}\n'
        '{"iteration": 4, "analysis/grad_norm/a": 0.25, "analysis/grad_norm/b": 1.0, "analysis/cosine/a/b": -0.125}\n'
    )
    norms, cosines = tool.logged(path)
    assert {task: (series.x, series.y) for task, series in norms.items()} == {
        "a": ([2, 4], [0.5, 0.25]),
        "b": ([4], [1]),
    }
    assert {pair: (series.x, series.y) for pair, series in cosines.items()} == {("a", "b"): ([4], [-0.125])}


def test_what_cannot_be_analysed_is_told(toy: Toy, tmp_path: Path) -> None:
    need_tasks("depth", "image_label")
    alone = trained(toy, tmp_path / "alone", tasks=("image_label",))
    with pytest.raises(ConfigError, match=r"run=.*alone: the network has one task, image_label; there is no pair"):
        tool.analyze_tasks(config(alone, tmp_path / "out"))
    data = f"images: {toy.images}, annotations: [{toy.boxes}]"
    sets = [f"{{name: {task}, {data}, tasks: [{task}], limit: 2}}" for task in ("image_label", "depth")]
    apart = f"data.train=[{', '.join(sets)}]"
    run = trained(toy, tmp_path / "apart", apart, tasks=("depth", "image_label"))
    with pytest.raises(DataError, match=r"two tasks have a gradient in none of 4 batches; look at what data\.train"):
        tool.analyze_tasks(config(run, tmp_path / "out", "batches=4", "images_per_batch=1"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="no checkpoint in this directory"):
        tool.analyze_tasks(config(tmp_path / "empty", tmp_path / "out"))
    assert not (tmp_path / "out").exists()
