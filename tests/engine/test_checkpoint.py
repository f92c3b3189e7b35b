"""Checkpoints: whole or not there, refused by name when they are damaged, and loaded completely or not at all."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.checkpoint import KEYS, Checkpointer
from mtl_rcnn.engine.weights import check_label_space, format_report, load_weights
from mtl_rcnn.errors import CheckpointError, ConfigError


def state(iteration: int, **parts: Any) -> dict[str, Any]:
    return {**dict.fromkeys(KEYS), "format": 1, "iteration": iteration, "model": {"w": torch.ones(3)}, **parts}


class Network(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.trunk = nn.Linear(3, 4)
        self.tasks = nn.ModuleDict({"one": nn.Linear(4, 2), "two": nn.Linear(4, 5)})


def test_a_checkpoint_comes_back_as_it_went(tmp_path: Path) -> None:
    saved = state(5, best={"metric": "a/b/AP", "value": 1.5}, config={"tasks": ["x"], "lr": 0.1})
    checkpoints.save(tmp_path / "model.pth", saved)
    found = checkpoints.load(tmp_path / "model.pth")
    assert torch.equal(found.pop("model")["w"], saved.pop("model")["w"])
    assert found == saved
    assert [path.name for path in tmp_path.iterdir()] == ["model.pth"]


def test_the_newest_are_kept_and_the_pointer_survives_its_loss(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    keeper = Checkpointer(tmp_path, keep=2)
    for iteration in (10, 20, 30):
        keeper.save(iteration, state(iteration))
    keeper.save_best(state(20), {"value": 3.0})
    assert {path.name for path in tmp_path.glob("*.pth")} == {
        "model_0000020.pth",
        "model_0000030.pth",
        "model_best.pth",
    }
    assert checkpoints.load(tmp_path / "model_best.pth")["best"] == {"value": 3.0}
    assert keeper.latest() == tmp_path / "model_0000030.pth"
    assert not caplog.records
    (tmp_path / "model_0000030.pth").unlink()
    assert keeper.latest() == tmp_path / "model_0000020.pth"
    assert "names model_0000030.pth, which is missing" in caplog.text
    assert Checkpointer(tmp_path / "other", keep=1).latest() is None
    with pytest.raises(ConfigError, match=r"checkpoint\.keep"):
        Checkpointer(tmp_path, keep=0)


@pytest.mark.parametrize("damage", ["truncated", "empty", "text", "other"])
def test_a_damaged_file_is_named_with_another_to_use(tmp_path: Path, damage: str) -> None:
    keeper = Checkpointer(tmp_path, keep=3)
    keeper.save(10, state(10))
    path = keeper.save(20, state(20))
    content = path.read_bytes()
    if damage == "other":
        torch.save({"weights": torch.ones(2)}, path)
    else:
        path.write_bytes({"truncated": content[: len(content) // 2], "empty": b"", "text": b"not a checkpoint"}[damage])
    with pytest.raises(CheckpointError, match=r"model_0000020\.pth .*resume from model_0000010\.pth"):
        checkpoints.load(path)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        checkpoints.load(tmp_path / "model_0000040.pth")


def test_a_strangers_file_runs_no_code(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            return os.mkdir, (str(tmp_path / "was_run"),)

    torch.save({"format": 1, "model": Evil()}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match="not a readable checkpoint"):
        checkpoints.load(tmp_path / "model.pth")
    assert not (tmp_path / "was_run").exists()


def test_values_that_could_not_be_read_again_are_refused_when_writing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"best\.path is a pathlib"):
        checkpoints.save(tmp_path / "model.pth", state(1, best={"path": tmp_path}))
    assert list(tmp_path.iterdir()) == []


def test_weights_load_completely_or_not_at_all() -> None:
    network, other = Network(), Network()
    reports = load_weights(network, other.state_dict(), "file.pth")
    assert {report.module for report in reports} == {"trunk", "tasks.one", "tasks.two"}
    assert torch.equal(network.trunk.weight, other.trunk.weight)
    spoilt = {**Network().state_dict(), "tasks.one.weight": torch.zeros(7, 4), "extra.bias": torch.zeros(1)}
    del spoilt["trunk.bias"]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    with pytest.raises(CheckpointError) as fault:
        load_weights(network, spoilt, "file.pth")
    for said in ("file.pth does not fit the network: 3 tensors", "tasks.one.weight", "trunk.bias", "extra.bias"):
        assert said in str(fault.value)
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    reports = load_weights(network, spoilt, "file.pth", ["tasks.one.*", "trunk.bias", "extra.*"])
    assert torch.equal(network.trunk.weight, spoilt["trunk.weight"])
    assert "tasks.one" in format_report(reports)
    with pytest.raises(CheckpointError, match="matches no tensor"):
        load_weights(network, other.state_dict(), "file.pth", ["tasks.three.*"])


def test_other_classes_are_an_error_that_lists_them() -> None:
    ours = LabelSpace(({"name": "cat"}, {"name": "dog"}))
    check_label_space(ours.state(), ours, "file.pth")
    with pytest.raises(CheckpointError, match=r"file\.pth.*cow"):
        check_label_space(LabelSpace(({"name": "cat"}, {"name": "cow"})).state(), ours, "file.pth")
