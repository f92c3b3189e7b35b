"""The benchmark's stock Detectron2 is the experiment's network, and is fed what the experiment is fed. What is called
communication is what a step of several processes takes beyond the same step without any."""

import importlib.util
import json
import sys
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling import build_model as build_stock_model
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig
from ranks import fork_ranks
from tiny import NETWORK, TASKS

from mtl_rcnn.config import compose
from mtl_rcnn.data.shape_scenes import write_shape_scenes
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.distributed import distributed, gather_objects
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.tasks.keypoint import read_schemas
from tests.reference import copy_weights

SCRIPTS = Path(__file__).parents[1] / "benchmarks"
SMALL = ["experiment=shapes", *NETWORK, *(knob for task in ("detection", "mask", "keypoint") for knob in TASKS[task])]
SMALL += ["tasks.detection.conv_dims=[]"]


def load(name: str) -> ModuleType:
    """A script as a module."""
    spec = importlib.util.spec_from_file_location(name, SCRIPTS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def benchmark() -> Iterator[ModuleType]:
    module = load("against_detectron2")
    yield module
    BACKBONE_REGISTRY._obj_map.pop("resnet_fpn_of_width")
    for split in ("stock_train", "stock_val"):
        DatasetCatalog.remove(split)
        MetadataCatalog.remove(split)


@pytest.fixture(scope="module")
def scaling() -> ModuleType:
    return load("ddp_scaling")


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> DictConfig:
    root = tmp_path_factory.mktemp("scenes")
    write_shape_scenes(root, train=3, val=1, seed=0)
    return compose("train", ["experiment=demo", f"data.root={root}"])


def test_same_network_and_same_keypoints(benchmark: ModuleType, experiment: DictConfig, tmp_path: Path) -> None:
    datasets, label_space = train_datasets(experiment)
    schemas = read_schemas(label_space, {}, {})
    benchmark.register_data(experiment, label_space.classes, schemas, tmp_path)
    cfg = benchmark.stock_config(experiment, label_space.classes, schemas, tmp_path, seed=0)
    model, stock = build_model(experiment, label_space), build_stock_model(cfg)
    copy_weights(model, stock)  # raises unless every parameter of the one is in the other with the same shape
    assert sum(p.numel() for p in stock.parameters()) == sum(p.numel() for p in model.parameters())
    assert torch.equal(stock.pixel_std.flatten(), torch.tensor(list(experiment.model.pixel_std)))

    records = {record["image_id"]: record for record in datasets[0].records}
    for stock_record in DatasetCatalog.get("stock_train"):
        ours = records[stock_record["image_id"]]["annotations"]
        assert len(stock_record["annotations"]) == len(ours)
        for theirs, mine in zip(stock_record["annotations"], ours):
            owner = next((schema for schema in schemas if mine["category_id"] in schema.classes), None)
            visible = sum(v > 0 for v in theirs["keypoints"][2::3])
            assert visible == (sum(v > 0 for v in mine["keypoints"][2::3]) if owner else 0)
    meta = MetadataCatalog.get("stock_train")
    assert ("figure:left_knee", "figure:right_knee") in meta.keypoint_flip_map
    assert len(meta.keypoint_names) == schemas[-1].channels.stop
    assert json.loads((tmp_path / "instances_val.json").read_text())["annotations"]


def test_what_a_step_of_several_processes_consists_of(scaling: ModuleType) -> None:
    silent = [[[2.0, 8.0], [5.0, 9.0]]]  # until the losses would meet, until the end
    assert scaling.parts([[[11.5], [12.0]]], silent) == {
        "step": 12.0,
        "computing": 8.5,
        "waiting": 5.0 + 6.0 - 8.5,
        "communicating": 1.0,
    }
    assert scaling.parts([[[11.5], [12.0]]], [[[8.0], [9.0]]])["waiting"] == 0.5, "who meets nowhere waits at the end"
    assert scaling.runs_of("weak", [1, 2, 4], 2) == [(1, 2), (2, 2), (4, 2)]
    assert scaling.runs_of("strong", [1, 2, 4], 2) == [(1, 8), (2, 4), (4, 2)]
    with pytest.raises(SystemExit, match="8 images"):
        scaling.runs_of("strong", [3, 4], 2)


def test_silent_loops_do_not_communicate_and_the_others_do(
    scaling: ModuleType, experiment: DictConfig, tmp_path: Path
) -> None:
    cfg = compose("train", [*SMALL, f"data.root={experiment.data.root}", "data.workers=0", "solver.batch_size=2"])
    datasets, label_space = train_datasets(cfg)

    def rank() -> None:
        with distributed("cpu", timeout_s=60) as ranks, fail_together(ranks), EventStorage():
            batches = list(islice(train_loader(cfg, datasets, build_targets(cfg, label_space), 0, ranks), 1))

            def gradients(name: str, silent: bool) -> float:
                model = build_model(cfg, label_space)
                if name == scaling.OURS:
                    step = scaling.ours(cfg, label_space, model, batches, ranks, tmp_path, silent)
                else:
                    step = scaling.peer(cfg, model, batches, silent)
                step(0)
                return sum(parameter.grad.double().square().sum().item() for parameter in model.parameters())

            for name in (scaling.OURS, scaling.PEER):
                if ranks.is_main:  # the other rank is not there to be met
                    with scaling.silence() as met:
                        alone = gradients(name, silent=True)
                    assert len(met) == (name == scaling.OURS)
                first, second = gather_objects(gradients(name, silent=False))
                assert first == second
                assert not ranks.is_main or first != alone

    assert fork_ranks(rank, 2) == [0, 0]


@pytest.mark.slow
def test_scaling_is_measured_and_printed(
    scaling: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.json"
    options = ["--ranks", "1", "2", "--batch", "1", "--iterations", "2", "--turns", "1", "--json", str(out)]
    monkeypatch.setattr(sys, "argv", ["ddp_scaling.py", *SMALL, *options, "--scaling", "weak"])
    scaling.main()
    lines = capsys.readouterr().out.splitlines()
    assert [line.count("|") - 1 for line in lines if line.startswith("|")] == [10] * 4 + [8] * 6
    one, two = ({**row, **row["turns"][0]} for row in json.loads(out.read_text()))
    assert (one["processes"], two["processes"], two["images of each"]) == (1, 2, 1)
    assert one["all_reduce"] == one["planned"] == one[scaling.OURS]["waiting"] == 0
    assert min(two["all_reduce"], two["planned"], two["ratio"], two[scaling.OURS]["step"]) > 0
    assert one["gradient_bytes"] == two["gradient_bytes"] > 0
