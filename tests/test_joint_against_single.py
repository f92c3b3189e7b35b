"""The benchmark's networks say what the joint network says of their task, and its sums are the networks'."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from tiny import LABEL_SPACE, NETWORK, make_sample, need_tasks, region_tasks, tiny_model

from mtl_rcnn.config import compose
from mtl_rcnn.engine.build import build_model

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "joint_against_single.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("joint_against_single", SCRIPT)
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # data classes look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def test_each_tasks_own_network_predicts_as_the_joint_one(benchmark: ModuleType) -> None:
    overrides = ["experiment=all_tasks", "data.root=unused", *NETWORK, "tasks.detection.score_thresh=0.0"]
    cfg = compose("train", overrides)
    tasks, joint = list(cfg.tasks), build_model(cfg, LABEL_SPACE)
    networks = benchmark.single_networks(joint, cfg, LABEL_SPACE)
    assert set(networks) == {benchmark.JOINT, benchmark.BOXES, *tasks}
    image, size = make_sample(3, (64, 96), 0)["image"], torch.tensor([70, 100])
    (whole,) = joint.predict_tensors([image], [size])
    for name in (*tasks, benchmark.BOXES):
        (own,) = networks[name].predict_tensors([image], [size])
        assert own
        assert all(torch.equal(value, whole[key]) for key, value in own.items()), name
        assert ("boxes" in own) == (name in region_tasks() or name == benchmark.BOXES)
    assert set(networks["detection"].predict_tensors([image], [size])[0]) == {"boxes", "scores", "classes"}


def test_sums_are_taken_turn_by_turn(benchmark: ModuleType) -> None:
    need_tasks("mask", "depth")
    networks = {benchmark.JOINT: tiny_model(["detection", "mask", "depth"])}
    networks |= {name: tiny_model(chosen) for name, chosen in (("detection", ["detection"]), ("depth", ["depth"]))}
    networks |= {"mask": networks[benchmark.JOINT], benchmark.BOXES: tiny_model(["detection", "mask"])}
    seconds = {benchmark.JOINT: [2.0, 1.0, 4.0], "detection": [1.0, 9.0, 2.0], "depth": [2.0, 1.0, 2.0]}
    seconds |= {"mask": [3.0, 1.0, 4.0], benchmark.BOXES: [4.0, 2.0, 6.0]}
    found = {row.name: row for row in benchmark.rows(networks, {1: seconds})}
    total = found["sum of 3 networks"]
    assert total.seconds[1] == 8.0, "median of 6, 11, 8"
    assert total.over_joint[1] == 3.0, "median of 3, 11, 2"
    assert total.parameters == sum(found[name].parameters for name in ("detection", "depth", "mask"))
    shared = next(row for name, row in found.items() if name.startswith("sum of 2"))
    assert shared.seconds[1] == 6.0
    assert len(benchmark.table(list(found.values())).splitlines()) == 2 + len(found)
