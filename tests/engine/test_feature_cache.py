"""Kept features train as the trunk does, are computed once per image, and are never another image's or trunk's."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch
from accumulate_worker import make_trainer
from frozen_runs import ONE_SIZE, SEVERAL_SIZES, TASKS, counted_trunk, frozen_config, weights_of
from test_schedule import SOLVER
from tiny import make_sample, need_tasks, tiny_config, tiny_model
from torch import Tensor
from torch.nn import functional as F
from toy import SIZES, Toy

from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.freeze import cache_features, freeze
from mtl_rcnn.engine.schedule import build_optimizer
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.inference import evaluation_mode
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


def network(where: Path | str = "ram", *overrides: str, names: tuple[str, ...] = ("trunk",)) -> MultiTaskRCNN:
    """A network that keeps features."""
    cfg = tiny_config(["detection"], *ONE_SIZE, "solver.freeze=[trunk]", f"model.cache_features={where}", *overrides)
    model = tiny_model(["detection"], *overrides)
    freeze(model, names)
    cache_features(cfg, model)
    return model.train()


def image(seed: int, height: int = 64, width: int = 96) -> Tensor:
    return make_sample(seed, (height, width), 1)["image"]


def features(model: MultiTaskRCNN, *pixels: Tensor) -> dict[str, Tensor]:
    """What the tasks get, by way of what is kept."""
    return model.cache(pixels, model._normalise(pixels))


def runs(model: MultiTaskRCNN, *pixels: Tensor) -> int:
    """How often the trunk runs for these."""
    with counted_trunk() as seen:
        features(model, *pixels)
    return len(seen)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_steps_with_kept_features_are_the_steps_without(layout: torch.memory_format) -> None:
    """In double precision, where no rounding decides what a ReLU lets through."""
    found = []
    for where in ("null", "ram"):
        model = network(where).double().to(memory_format=layout)
        batches = [[make_sample(step % 2 + i, (64, 96), 3) for i in range(3)] for step in range(4)]
        trainer = make_trainer(model, batches, ALONE, 1, lr=0.02)
        trainer.optimizer = build_optimizer(model, SOLVER)
        with counted_trunk() as seen:
            for trainer.iter in range(4):
                trainer.run_step()
        assert seen == ([3] * 4 if where == "null" else [1] * 4)
        found.append(model.state_dict())
    for name, tensor in found[0].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=0, atol=1e-12)  # measured: 0


@pytest.mark.parametrize("where", ["ram", "folder"])
def test_a_run_with_kept_features_is_the_run_without(where: str, toy: Toy, tmp_path: Path) -> None:
    need_tasks(*TASKS)
    frozen = (*ONE_SIZE, "solver.freeze=[trunk]")
    kept = (*frozen, f"model.cache_features={where if where == 'ram' else tmp_path / 'features'}")
    with counted_trunk() as plain:
        train(frozen_config(toy, tmp_path / "plain", *frozen))
    with counted_trunk() as once:
        train(frozen_config(toy, tmp_path / "kept", *kept))
    assert (plain, once) == ([2] * 6, [1] * len(SIZES))  # both two epochs
    expected, found, early = (weights_of(tmp_path / run, n) for run, n in (("plain", 6), ("kept", 6), ("kept", 3)))
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-6)  # measured: 6e-8
        assert torch.equal(found[name], early[name]) == name.startswith("backbone.")
    with counted_trunk() as again:
        train(frozen_config(toy, tmp_path / "again", *kept))
    assert len(again) == (len(SIZES) if where == "ram" else 0)
    assert all(torch.equal(found[name], tensor) for name, tensor in weights_of(tmp_path / "again").items())


def test_a_resumed_run_is_the_same_whatever_was_kept(toy: Toy, tmp_path: Path) -> None:
    need_tasks(*TASKS)
    for folder, lengths in (("whole", [6]), ("parts", [2, 6])):
        for length in lengths:
            kept = (*SEVERAL_SIZES, "solver.freeze=[trunk]", "model.cache_features=ram", "solver.steps=[]")
            train(frozen_config(toy, tmp_path / folder, *kept, f"solver.max_iter={length}"))
    whole, resumed = (weights_of(tmp_path / folder) for folder in ("whole", "parts"))
    assert all(torch.equal(tensor, resumed[name]) for name, tensor in whole.items())


def test_smaller_images_get_zeros_behind_the_trunk() -> None:
    model = network()
    pixels = [image(0, 40, 90), image(1, 70, 60)]
    batch = features(model, *pixels)
    assert batch["p2"].shape[-2:] == (24, 24)
    assert {name: level.shape for name, level in batch.items()} == {
        name: level.shape for name, level in model.backbone(model._normalise(pixels).tensor).items()
    }
    for index, alone in enumerate(model.backbone(model._normalise([entry]).tensor) for entry in pixels):
        for name, level in alone.items():
            height, width = (whole - own for whole, own in zip(batch[name].shape[-2:], level.shape[-2:]))
            assert torch.equal(batch[name][index], F.pad(level[0], (0, width, 0, height)))
    assert not any(level.requires_grad for level in batch.values())


@pytest.mark.parametrize("where", ["ram", "folder"])
def test_each_image_and_each_way_to_look_at_it_is_computed_once(where: str, tmp_path: Path) -> None:
    model = network("ram" if where == "ram" else tmp_path / "features")
    first, second = image(0), image(1)
    assert runs(model, first, second, first) == 2
    assert runs(model, second, first) == 0
    assert runs(model, first.flip(2)) == 1
    assert runs(model, first[:, :40]) == 1
    assert runs(model, first.float()) == 1


def test_only_training_keeps_anything(tmp_path: Path) -> None:
    model, batch = network(tmp_path / "features"), [make_sample(0, (64, 96), 2)]
    with counted_trunk() as seen:
        with evaluation_mode(model):
            model.losses(batch)  # as validation losses are
            model(batch)
        assert (len(seen), len(list(tmp_path.rglob("*.pt")))) == (2, 0)
        model(batch)
        model(batch)
    assert (len(seen), len(list(tmp_path.rglob("*.pt")))) == (3, 1)


def test_features_of_another_trunk_are_not_found(tmp_path: Path) -> None:
    where = tmp_path / "features"
    assert runs(network(where), image(0)) == 1
    assert runs(network(where), image(0)) == 0
    for change in ("seed=1", "model.backbone.norm=SyncBN", "model.pixel_mean=[0,0,0]", "model.channels_last=true"):
        assert runs(network(where, change), image(0)) == 1
    assert len(list(where.iterdir())) == 5


def test_half_precision_is_not_taken_for_single_nor_single_for_half(tmp_path: Path) -> None:
    model, pixels = network(tmp_path / "features"), image(0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = features(model, pixels)
    whole = features(model, pixels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(torch.equal(level, half[name]) for name, level in features(model, pixels).items())
        expected = model.backbone(model._normalise([pixels]).tensor)
    assert {name: level.dtype for name, level in half.items()} == {name: f.dtype for name, f in expected.items()}
    assert torch.bfloat16 in {level.dtype for level in half.values()}
    assert {level.dtype for level in whole.values()} == {torch.float32}


def test_the_layout_of_the_trunk_is_kept(tmp_path: Path) -> None:
    model = network(tmp_path / "features").to(memory_format=torch.channels_last)
    for _ in range(2):
        assert features(model, image(0), image(1))["p2"].is_contiguous(memory_format=torch.channels_last)


def test_a_damaged_file_is_told_and_made_anew(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = network(tmp_path / "features")
    expected = features(model, image(0))
    (file,) = (path for path in tmp_path.rglob("*") if path.is_file())
    file.write_bytes(file.read_bytes()[:-200])
    with caplog.at_level(logging.WARNING):
        found = features(model, image(0))
    assert "computed anew" in caplog.text
    assert runs(model, image(0)) == 0
    assert all(torch.equal(level, found[name]) for name, level in expected.items())


def test_a_trunk_that_learns_is_refused(tmp_path: Path) -> None:
    assert network(names=("backbone.*",)).cache is not None
    with pytest.raises(
        ConfigError, match=r"model\.cache_features=ram: .* does not change; add solver\.freeze=\[trunk\]"
    ):
        network(names=("backbone.bottom_up.*",))
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigError, match=r"model\.cache_features=.*/file: this folder cannot be made"):
        network(tmp_path / "file")
