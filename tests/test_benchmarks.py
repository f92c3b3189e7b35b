"""The benchmark's stock Detectron2 is the experiment's network, and is fed what the experiment is fed."""

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling import build_model as build_stock_model
from omegaconf import DictConfig

from mtl_rcnn.config import compose
from mtl_rcnn.data.shape_scenes import write_shape_scenes
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.tasks.keypoint import read_schemas
from tests.reference import copy_weights

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "against_detectron2.py"


@pytest.fixture(scope="module")
def benchmark() -> ModuleType:
    spec = importlib.util.spec_from_file_location("against_detectron2", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    BACKBONE_REGISTRY._obj_map.pop("resnet_fpn_of_width")
    for split in ("stock_train", "stock_val"):
        DatasetCatalog.remove(split)
        MetadataCatalog.remove(split)


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
