"""ONNX in onnxruntime against the network itself: free batch and size, a fixed number of rows."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.structures.keypoints import heatmaps_to_keypoints
from reference import randomise_statistics
from tiny import LABEL_SPACE, available_tasks, make_sample, need_tasks, region_tasks, tiny_model
from torch import Tensor

from mtl_rcnn.errors import ExportError
from mtl_rcnn.export.onnx_file import export_onnx, pad_batch
from mtl_rcnn.export.onnx_network import FixedNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

PREPROCESSING = {"short_edge": None, "max_size": None, "channel_order": "RGB"}
SIZES = [(64, 96), (96, 64), (100, 130)]
ROWS = 30


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    """Three of noise, and a plain one on which nothing is found."""
    noise = [make_sample(i, size, 0)["image"] for i, size in enumerate(SIZES)]
    return [*noise, torch.full((3, 64, 96), 114, dtype=torch.uint8)]


@pytest.fixture(scope="module")
def model(images: list[Tensor]) -> MultiTaskRCNN:
    """Random, with a threshold between its best score on the plain image and on noise."""
    rows = f"tasks.detection.detections_per_image={ROWS}"
    model = tiny_model(region_tasks(), "tasks.detection.score_thresh=0.0", rows)
    randomise_statistics(model, seed=4)
    # These random weights move boxes by their whole width; a trained network's do not, nor do they enlarge rounding so.
    model.roi_heads.detector.box_predictor.bbox_pred.weight.data.mul_(0.1)
    model.eval()
    best = [float(p["scores"].max()) for p in [*predict(model, images), *predict(model, images[3:])]]
    assert min(best[:3]) > max(best[3:]), "choose another seed"
    model.roi_heads.detector.score_thresh = max(best[3:]) + 1e-4
    return model


def predict(model: MultiTaskRCNN, images: list[Tensor]) -> list[dict[str, Tensor]]:
    return model.predict_tensors(images, own_sizes(images))


def own_sizes(images: list[Tensor]) -> list[Tensor]:
    return [torch.tensor(image.shape[-2:]) for image in images]


@pytest.fixture(scope="module")
def written(model: MultiTaskRCNN, images: list[Tensor], tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    folder = tmp_path_factory.mktemp("onnx")
    export_onnx(model, LABEL_SPACE, images[:3], folder, PREPROCESSING, {}, min_detections=20)
    return folder


@pytest.mark.parametrize("chosen", [[0], [1], [0, 1, 2, 3], [3], [3, 2, 3, 0]], ids=str)
def test_onnxruntime_finds_what_the_network_finds(
    chosen: list[int], written: Path, model: MultiTaskRCNN, images: list[Tensor]
) -> None:
    import onnxruntime

    batch = [images[index] for index in chosen]
    sizes = own_sizes(batch)
    session = onnxruntime.InferenceSession(str(written / "model.onnx"), providers=["CPUExecutionProvider"])
    manifest = json.loads((written / "model.onnx.json").read_text())
    inputs = [value.numpy() for value in pad_batch(batch, sizes, manifest["size_divisibility"])]
    names = [entry["name"] for entry in manifest["outputs"]]
    found = dict(zip(names, session.run(None, dict(zip([entry["name"] for entry in manifest["inputs"]], inputs)))))
    for row, (index, expected) in enumerate(zip(chosen, model.predict_tensors(batch, sizes), strict=True)):
        count = int(found["count"][row])
        assert count == len(expected["boxes"])
        assert (count == 0) == (index == 3)
        assert found["boxes"].shape[1:] == (ROWS, 4)
        for name in ("boxes", "scores", "classes"):
            np.testing.assert_allclose(found[name][row, :count], expected[name].numpy(), rtol=0, atol=1e-4)
            assert not found[name][row, count:].any()


def test_the_certificate_covers_batches_and_nothing(written: Path) -> None:
    manifest = json.loads((written / "model.onnx.json").read_text())
    rows = {case["case"]: case["rows"] for case in manifest["certificate"]}
    assert rows["no detections"] == [0]
    assert rows["many detections"][0] > 20
    assert len(rows["batch of three sizes"]) == 3
    assert {"boxes", "scores", "classes"} < set(manifest["certificate"][0]["differences"])


@torch.no_grad()
def test_grids_hold_the_masks_and_keypoints_of_the_network(model: MultiTaskRCNN, images: list[Tensor]) -> None:
    need_tasks("mask", "keypoint")
    from mtl_rcnn.tasks.mask import paste_masks

    network, batch = FixedNetwork(model), images[:1]
    outputs = network(*pad_batch(batch, own_sizes(batch), 32))
    found = dict(zip(network.names, outputs, strict=True))
    count = int(found["count"])
    (expected,) = predict(model, batch)
    boxes = found["boxes"][0, :count]
    masks = paste_masks(found["mask_grids"][0, :count], boxes, torch.tensor(SIZES[0]))
    assert torch.equal(masks, expected["masks"])
    assert masks.any()
    points = heatmaps_to_keypoints(found["keypoint_heatmaps"][0, :count], boxes)[:, :, [0, 1, 3]]
    owners = expected["classes"] == 0
    assert owners.any()
    torch.testing.assert_close(points[owners], expected["keypoints"][owners], rtol=0, atol=1e-4)


def test_a_missing_package_is_named(
    model: MultiTaskRCNN, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("onnx"):
            raise ModuleNotFoundError(f"No module named {name}", name=name)
        return real(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ExportError, match=r"needs onnx: pip install 'mtl-rcnn\[onnx\]'"):
        export_onnx(model, LABEL_SPACE, images, tmp_path, PREPROCESSING, {}, 0)


def test_tasks_on_whole_images_are_refused_with_what_can_be_done() -> None:
    whole = [name for name in available_tasks() if name not in region_tasks()]
    if not whole:
        pytest.skip("this copy of the project has no task on whole images")
    with pytest.raises(
        ExportError, match=rf"{whole[0]}: tasks on .* \(export\.tasks=\[detection\]\), or choose .*script"
    ):
        FixedNetwork(tiny_model(["detection", whole[0]]))
    with pytest.raises(ExportError, match=r"no fixed form so far; choose export\.method=trace or script"):
        FixedNetwork(tiny_model(whole[:1]))
