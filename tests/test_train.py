"""A whole run on the toy data set: files, resume, best checkpoint, failures."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from omegaconf import DictConfig, open_dict
from runs import equal
from tiny import available_tasks, need_tasks, tiny_config
from toy import Toy

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import on_the_way
from mtl_rcnn.engine.build import task_classes
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.replay import first_nonfinite_module, replay
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer
from mtl_rcnn.errors import CheckpointError, ConfigError, DataError, TrainingError

TASKS = tuple(available_tasks())


def toy_config(toy: Toy, folder: Path | str, *overrides: str, tasks: tuple[str, ...] = TASKS) -> DictConfig:
    """Four iterations on the toy images, two at a time."""
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    small = [
        *("solver.batch_size=2", "solver.max_iter=4", "solver.steps=[0.8]", "solver.warmup_iters=2"),
        *("solver.lr=0.005", "solver.log_period=1", "solver.eval_period=0", "solver.checkpoint_period=2"),
        *("data.workers=0", "data.train_augment.resize.short_edge_length=[48,56]", "device=cpu", "threads=1"),
        *("data.test_augment.resize.short_edge_length=48", "report.enabled=false", "evaluation.samples=0"),
    ]
    return tiny_config(tasks, f"data.train=[{data}]", f"data.val=[{data}]", f"output_dir={folder}", *small, *overrides)


def test_a_run_leaves_everything_it_promises(toy: Toy, tmp_path: Path) -> None:
    cfg = toy_config(toy, tmp_path / "run", "report.enabled=true", "report.images=1")
    outcome = train(cfg)
    found = {path.name for path in outcome.folder.iterdir()}
    assert {"config.yaml", "command.txt", "log.txt", "metrics.json", "metrics.jsonl", "tensorboard"} <= found
    assert {"environment.json", "hosts.json", "report.html", "labels.json", "evaluated.json", "evaluation"} <= found
    assert {"model_0000002.pth", "model_0000004.pth", "model_best.pth", "last_checkpoint"} <= found
    metrics = json.loads((outcome.folder / "metrics.json").read_text())
    assert {f"toy/{name}/{cls.evaluator_class.headline}" for name, cls in task_classes(cfg).items()} <= set(metrics)
    assert all(value == value and value >= 0 for value in metrics.values())
    assert {path.name for path in (outcome.folder / "predictions").glob("*.json")} == {f"toy_{t}.json" for t in TASKS}
    rows = read_metrics(outcome.folder / "metrics.jsonl")
    assert [row["iteration"] for row in rows] == [1, 2, 3, 4, 4]
    assert {"total", "lr"} <= set(rows[0])
    assert all(any(name.startswith(f"{task}/") for name in rows[0]) for task in TASKS)
    log = (outcome.folder / "log.txt").read_text()
    for said in (
        "solver.max_iter: 90000 -> 4",
        "images labelled",
        "trainable",
        "batch 1 ranks x 2 images = 2, lr 0.005",
    ):
        assert said in log


def test_an_evaluation_set_is_scored_for_the_tasks_that_it_declares(toy: Toy, tmp_path: Path) -> None:
    need_tasks("mask")

    def config(folder: str, declared: str) -> DictConfig:
        cfg = toy_config(toy, tmp_path / folder, "solver.max_iter=1", "solver.steps=[]", tasks=("detection", "mask"))
        with open_dict(cfg):
            cfg.data.val[0].tasks = [declared]
        return cfg

    names = set(train(config("run", "detection")).metrics)
    assert "toy/detection/AP" in names
    assert not any(name.startswith("toy/mask/") for name in names)
    with pytest.raises(
        ConfigError, match=r"'toy' declares tasks: \[depth\], and the network has detection, mask: noth"
    ):
        train(config("other", "depth"))


def test_faulty_labels_of_an_evaluation_set_are_told_before_anything_trains(toy: Toy, tmp_path: Path) -> None:
    need_tasks("image_label")
    cfg = toy_config(toy, tmp_path / "run", tasks=("image_label",))
    content = json.loads(toy.boxes.read_text())
    content["images"][0]["image_labels"] = ["no such label"]
    spoilt = tmp_path / "spoilt.json"
    spoilt.write_text(json.dumps(content))
    with open_dict(cfg):
        cfg.data.val[0].annotations = [str(spoilt)]
    with pytest.raises(DataError, match="names 'no such label', which the data set's vocabulary"):
        train(cfg)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_an_evaluation_that_fails_at_the_end_does_not_cost_the_training(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = toy_config(toy, tmp_path / "run", "solver.checkpoint_period=0", tasks=("detection",))
    with monkeypatch.context() as broken:
        broken.setattr(on_the_way, "evaluate", Mock(side_effect=OSError("no space left")))
        with pytest.raises(OSError, match="no space left"):
            train(cfg)
    monkeypatch.setattr(Trainer, "run_step", Mock(side_effect=AssertionError("trains again")))
    assert "toy/detection/AP" in train(cfg).metrics


@pytest.mark.parametrize(
    "options",
    [
        (),
        (
            "solver.optimizer=adamw",
            "solver.lr=0.001",
            "solver.layer_decay=0.8",
            "solver.accumulate=2",
            "solver.ema=0.9",
        ),
        ("solver.precision=float16",),
        ("model.channels_last=true",),
    ],
    ids=["plain", "everything", "float16", "channels_last"],
)
def test_interrupted_and_resumed_equals_uninterrupted_bit_for_bit(
    options: tuple[str, ...], toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = train(toy_config(toy, tmp_path / "whole", *options)).folder
    step = Trainer.run_step

    def interrupted(self: Trainer) -> None:
        if self.iter == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "run_step", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(toy_config(toy, tmp_path / "halves", *options))
    torch.rand(3)  # no random state may matter
    halves = train(toy_config(toy, tmp_path / "halves", *options)).folder
    first, second = (checkpoints.load(folder / "model_0000004.pth") for folder in (whole, halves))
    assert (first["scaler"] is not None) == ("solver.precision=float16" in options)
    for part in ("model", "optimizer", "best", "ema", "scaler"):
        assert equal(first[part], second[part]), part
    assert read_metrics(whole / "metrics.jsonl") == read_metrics(halves / "metrics.jsonl")
    assert (whole / "metrics.json").read_text() == (halves / "metrics.json").read_text()


def test_the_memory_layout_changes_rounding_only(toy: Toy, tmp_path: Path) -> None:
    runs = [
        train(toy_config(toy, tmp_path / layout, f"model.channels_last={layout}", "data.val=[]")).folder
        for layout in ("false", "true")
    ]
    plain, last = (read_metrics(folder / "metrics.jsonl")[0] for folder in runs)
    assert last["total"] == pytest.approx(plain["total"], rel=1e-5)


@pytest.mark.parametrize("half", ["bfloat16", "float16"])
def test_half_precision_trains_and_stays_near_float32(half: str, toy: Toy, tmp_path: Path) -> None:
    runs = [
        train(toy_config(toy, tmp_path / precision, f"solver.precision={precision}", "data.val=[]")).folder
        for precision in ("float32", half)
    ]
    exact, rough = (read_metrics(folder / "metrics.jsonl")[0] for folder in runs)
    assert exact != rough
    assert rough["total"] == pytest.approx(exact["total"], rel=0.02)


def test_a_changed_seed_or_batch_is_refused_on_resume(toy: Toy, tmp_path: Path) -> None:
    train(toy_config(toy, tmp_path / "run", "data.val=[]", "solver.max_iter=2"))
    with pytest.raises(ConfigError, match=r"seed=1: .* was trained with 0"):
        train(toy_config(toy, tmp_path / "run", "data.val=[]", "seed=1"))
    with pytest.raises(ConfigError, match="holds a run already"):
        train(toy_config(toy, tmp_path / "run", "data.val=[]", "checkpoint.resume=false"))


def test_weights_of_another_run_start_a_new_one(toy: Toy, tmp_path: Path) -> None:
    need_tasks("mask")
    first = train(toy_config(toy, tmp_path / "first", "data.val=[]", "solver.max_iter=2")).folder
    path = first / "model_0000002.pth"
    only = toy_config(toy, tmp_path / "second", "data.val=[]", f"checkpoint.weights={path}", tasks=("detection",))
    with pytest.raises(CheckpointError, match=r"only in the file"):
        train(only)
    only.checkpoint.reinit = ["roi_heads.tasks.*", "image_tasks.*"]
    train(only)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(CheckpointError, match="truncated or damaged"):
        train(toy_config(toy, tmp_path / "third", f"checkpoint.weights={path}"))


def test_a_diverged_run_names_the_loss_and_the_images_and_replays(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"iteration \d+, rank 0: .*images: toy/\d+, toy/\d+") as failure:
        train(toy_config(toy, tmp_path / "run", "solver.lr=1e12", "solver.warmup_iters=0", "data.val=[]"))
    (path,) = (tmp_path / "run" / "failures").glob("*.pt")
    assert str(path) in str(failure.value)
    model, samples = replay(path)
    assert [f"toy/{sample['image_id']}" in str(failure.value) for sample in samples] == [True, True]
    assert first_nonfinite_module(model, samples) is not None


def test_an_unknown_best_metric_lists_what_there_is(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean toy/detection/AP"):
        train(toy_config(toy, tmp_path / "run", "solver.best_metric=toy/detection/AP5"))


def test_expected_metrics_are_checked(toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match=r"toy/detection/AP is .*, expected 99 within 1"):
        train(toy_config(toy, tmp_path / "run", "+expected={toy/detection/AP: [99, 1]}", tasks=("detection",)))


def test_unreadable_images_stop_the_run_or_are_left_out_by_name(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = toy.images / "11.png"
    broken.write_bytes(broken.read_bytes()[:200])
    with pytest.raises(DataError, match=r"11\.png .*cannot be decoded"):
        train(toy_config(toy, tmp_path / "run", tasks=("detection",)))
    outcome = train(toy_config(toy, tmp_path / "skip", "data.on_error=skip", tasks=("detection",)))
    log = (outcome.folder / "log.txt").read_text()
    assert "left out unreadable image number 1" in log
    assert "toy/detection/AP" in outcome.metrics


def test_a_declared_label_that_is_missing_is_an_error_before_training(toy: Toy, tmp_path: Path) -> None:
    need_tasks("mask")
    cfg = toy_config(toy, tmp_path / "run")
    with open_dict(cfg):
        cfg.data.train[0].tasks = ["detection", "mask"]
    with pytest.raises(DataError, match=r"image 12, annotation 104 has no 'segmentation'.*declares the task 'mask'"):
        train(cfg)


def test_repeated_images_make_longer_epochs_and_resume_exactly(toy: Toy, tmp_path: Path) -> None:
    # Of six images four show figures, two discs, two squares, one nothing: with t = 1 discs and squares count sqrt(3),
    # figures sqrt(1.5); four images show a disc or a square.
    options = ["data.repeat_thresh=1.0", "data.val=[]", "solver.steps=[0.9]", "solver.checkpoint_period=3"]
    whole = train(toy_config(toy, tmp_path / "whole", *options, "solver.max_iter=1ep", tasks=("detection",))).folder
    log = (whole / "log.txt").read_text()
    assert "toy: 6 images, 9.2 samples an epoch on average, each image 1.00 to 1.73 times" in log
    assert "5 iterations = 1.1 epochs of 9.2 samples (6 images)" in log
    half = train(toy_config(toy, tmp_path / "halves", *options, "solver.max_iter=3", tasks=("detection",))).folder
    train(toy_config(toy, tmp_path / "halves", *options, "solver.max_iter=1ep", tasks=("detection",)))
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (whole, half))
    assert [row["iteration"] for row in second] == [1, 2, 3, 4, 5]
    assert second == first
    with pytest.raises(ConfigError, match=r"data\.repeat_thresh=None: .* was trained with 1\.0"):
        train(toy_config(toy, tmp_path / "halves", "data.val=[]", "solver.max_iter=9", tasks=("detection",)))


def test_a_mixture_reports_its_shares_and_resumes_exactly(toy: Toy, tmp_path: Path) -> None:
    data = f"{{images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]"
    both = f"data.train=[{data}, name: all}}, {data}, name: few, limit: 2}}]"
    mixed = ["data.mixing.method=ratios", "+data.mixing.ratios.all=1", "+data.mixing.ratios.few=3"]
    options = [both, *mixed, "data.val=[]", "solver.checkpoint_period=3", "solver.batch_size=4", "solver.steps=[0.9]"]
    whole = train(toy_config(toy, tmp_path / "whole", *options, "solver.max_iter=3ep", tasks=("detection",))).folder
    log = (whole / "log.txt").read_text()
    words = [line.split() for line in log.split("mixture:")[1].splitlines()]
    assert ["dataset", "all", "25.00%", "1.00", "1.0"] in words  # of 6 images in 6 iterations
    assert ["dataset", "few", "75.00%", "3.00", "9.0"] in words
    assert ["task", "detection", "100.00%", "4.00", "3.0"] in words
    assert "6 iterations = 3.0 epochs of 8 images" in log
    half = train(toy_config(toy, tmp_path / "halves", *options, "solver.max_iter=3", tasks=("detection",))).folder
    train(toy_config(toy, tmp_path / "halves", *options, "solver.max_iter=3ep", tasks=("detection",)))
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (whole, half))
    assert [row["iteration"] for row in second] == [1, 2, 3, 4, 5, 6]
    assert second == first
    with pytest.raises(ConfigError, match=r"data\.mixing=None: .* was trained with .*'few': 3"):
        train(toy_config(toy, tmp_path / "halves", both, "solver.batch_size=4", "data.val=[]", tasks=("detection",)))


def test_a_data_set_is_repeated_by_its_own_number(toy: Toy, tmp_path: Path) -> None:
    data = f"{{images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]"
    twice = f"data.train=[{data}, name: once}}, {data}, name: twice, repeat: 2}}]"
    options = [twice, "data.val=[]", "solver.max_iter=3"]
    log = (train(toy_config(toy, tmp_path / "run", *options, tasks=("detection",))).folder / "log.txt").read_text()
    assert "twice: 6 images, 12.0 samples an epoch on average, each image 2.00 to 2.00 times" in log
    assert "0.3 epochs of 18.0 samples (12 images)" in log
    with pytest.raises(ConfigError, match=r"repeat of data\.train=\[1\]: .* was trained with \[1, 2\]"):
        train(toy_config(toy, tmp_path / "run", "data.val=[]", "solver.max_iter=9", tasks=("detection",)))
    with pytest.raises(ConfigError, match=r"data\.train\[0\]\.repeat=0: expected a number above 0"):
        train(toy_config(toy, tmp_path / "zero", f"data.train=[{data}, name: a, repeat: 0}}]"))
    with pytest.raises(ConfigError, match=r"data\.val\[0\]\.repeat=2: evaluation sees every image once"):
        train(toy_config(toy, tmp_path / "val", f"data.val=[{data}, name: a, repeat: 2}}]", tasks=("detection",)))
