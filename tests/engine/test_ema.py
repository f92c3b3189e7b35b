"""The average of the weights against its formula; a run evaluates it, saves it, and restores it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from test_train import toy_config
from torch import nn
from toy import Toy

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import on_the_way
from mtl_rcnn.engine import train as training
from mtl_rcnn.engine.ema import WeightAverage
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.errors import CheckpointError, ConfigError


class _Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(2, 2)
        self.tied = self.one
        self.norm = nn.BatchNorm1d(2)
        self.frozen = nn.Parameter(torch.tensor([0.1, 1 / 3]), requires_grad=False)


def test_the_average_follows_its_formula() -> None:
    torch.manual_seed(0)
    net = _Net().double()
    average = WeightAverage(net, 0.3)
    expected = {name: tensor.numpy().copy() for name, tensor in net.state_dict().items()}
    frozen = net.frozen.clone()
    for t, decay in enumerate((1 / 10, 2 / 11, 3 / 12, 0.3, 0.3)):  # (1 + t) / (10 + t), at most 0.3
        with torch.no_grad():
            net.one.weight += torch.randn(2, 2)
        net.norm(torch.randn(4, 2, dtype=torch.float64))
        average.update(t)
        for name, tensor in net.state_dict().items():
            if name == "norm.num_batches_tracked":
                expected[name] = np.array(t + 1)
            else:
                expected[name] = decay * expected[name] + (1 - decay) * tensor.numpy()
    for name, tensor in average.state_dict().items():
        np.testing.assert_allclose(tensor.numpy(), expected[name], rtol=1e-12, err_msg=name)
    assert torch.equal(average.state_dict()["frozen"], frozen)


def test_inside_the_block_the_network_is_the_average_and_afterwards_itself() -> None:
    net = _Net()
    average = WeightAverage(net, 0.9)
    start = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    with torch.no_grad():
        net.one.weight += 1
    with average.applied():
        assert all(torch.equal(tensor, start[name]) for name, tensor in net.state_dict().items())
    assert torch.equal(net.tied.weight, start["one.weight"] + 1)
    other = WeightAverage(_Net(), 0.9)
    other.load_state_dict(average.state_dict(), "model.pth")
    assert all(torch.equal(tensor, start[name]) for name, tensor in other.state_dict().items())
    with pytest.raises(CheckpointError, match=r"model\.pth does not fit"):
        other.load_state_dict({"one.weight": torch.ones(2, 2)}, "model.pth")
    with pytest.raises(ConfigError, match=r"solver\.ema=1"):
        WeightAverage(net, 1)


def test_a_run_evaluates_saves_and_restores_the_average(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    evaluated = {}
    real = on_the_way.evaluate

    def spy(model: nn.Module, *arguments: object, **named: object) -> dict:
        evaluated.update({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return real(model, *arguments, **named)

    monkeypatch.setattr(on_the_way, "evaluate", spy)
    folders = [
        training.train(toy_config(toy, tmp_path / str(ema), f"solver.ema={ema}", tasks=("detection",))).folder
        for ema in ("null", 0.9)
    ]
    plain, averaged = (checkpoints.load(folder / "model_0000004.pth") for folder in folders)
    assert plain["ema"] is None
    for name, tensor in averaged["model"].items():
        assert torch.equal(tensor, plain["model"][name]), name  # the training itself is the same
    assert any(not torch.equal(tensor, averaged["model"][name]) for name, tensor in averaged["ema"].items())
    restored = restore(folders[1]).model.state_dict()
    for name, tensor in averaged["ema"].items():
        assert torch.equal(tensor, evaluated[name]), name
        assert torch.equal(tensor, restored[name]), name


def test_a_checkpoint_from_before_averages_is_read(tmp_path: Path) -> None:
    keys = [key for key in checkpoints.KEYS if key != "ema"]
    torch.save({**dict.fromkeys(keys), "format": 1, "model": {"w": torch.ones(2)}}, tmp_path / "old.pth")
    state = checkpoints.load(tmp_path / "old.pth")
    assert state["ema"] is None
    assert checkpoints.trained_weights(state) is state["model"]
    keys.remove("model")
    torch.save({**dict.fromkeys(keys), "format": 1}, tmp_path / "short.pth")
    with pytest.raises(CheckpointError, match=r"keys \['model'\] are missing or unknown"):
        checkpoints.load(tmp_path / "short.pth")
