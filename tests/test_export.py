"""The exported file against the network: certificate, refusal, and a process that has neither Detectron2 nor
mtl_rcnn."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from reference import randomise_statistics
from tiny import LABEL_SPACE, available_tasks, make_sample, need_tasks, tiny_model
from torch import Tensor

from mtl_rcnn.errors import ExportError
from mtl_rcnn.export.certificate import Case, certify, choose_cases
from mtl_rcnn.export.torchscript import TracedNetwork, export_torchscript
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.runtime import ExportedNetwork, network_size, summary

TASKS = tuple(available_tasks())
PREPROCESSING = {"short_edge": 64, "max_size": 120, "channel_order": "BGR"}

BARE = """
import sys
class Refuse:
    def find_spec(self, name, *rest):
        if name.split(".")[0] in ("detectron2", "mtl_rcnn", "fvcore", "hydra", "cv2"):
            raise ImportError(f"{name} is not to be had here")
sys.meta_path.insert(0, Refuse())
import runtime
sys.argv = ["runtime.py", "model.ts", "image.png"]
runtime.main()
"""


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [make_sample(i, size, 0)["image"] for i, size in enumerate([(64, 96), (96, 64), (64, 80)])]


@pytest.fixture(scope="module")
def model(images: list[Tensor]) -> MultiTaskRCNN:
    """Random, but sure of itself on noise and not on plain images."""
    model = tiny_model(TASKS, "tasks.detection.score_thresh=0.0")
    randomise_statistics(model, seed=4)
    model.eval()

    def best(image: Tensor) -> Tensor:
        return model.predict_tensors([image], [torch.tensor(image.shape[-2:])])[0]["scores"].max()

    plain = max(best(torch.full_like(images[0], value)) for value in (114, 0))
    assert all(best(image) > plain for image in images), "choose another seed"
    model.roi_heads.detector.score_thresh = float(plain) + 1e-4
    return model


@pytest.fixture(scope="module", params=["trace", "script"])
def exported(
    request: pytest.FixtureRequest,
    model: MultiTaskRCNN,
    images: list[Tensor],
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    folder = tmp_path_factory.mktemp("exported")
    export_torchscript(model, LABEL_SPACE, images, folder, PREPROCESSING, {"versions": {}}, 3, method=request.param)
    return folder


def test_certificate_covers_sizes_crowds_and_nothing(exported: Path) -> None:
    manifest = json.loads((exported / "manifest.json").read_text())
    cases = {case["case"]: case for case in manifest["certificate"]}
    alone = {"size 1", "size 2", "size 3", "many detections", "no detections"}
    batches = {"batch of three sizes", "batch of three with none"} if manifest["method"] == "script" else set()
    assert set(cases) == alone | batches
    assert all(len(cases[name]["rows"]) == 3 for name in batches)
    assert len({tuple(case["network_sizes"][0]) for case in cases.values()}) >= 3
    assert all(case["network_sizes"] != case["original_sizes"] for case in cases.values())
    assert cases["many detections"]["rows"][0] > 3
    assert cases["no detections"]["rows"] == [0]
    assert all(difference <= 1e-4 for case in cases.values() for difference in case["differences"].values())


def test_manifest_says_what_goes_in_and_comes_out(exported: Path) -> None:
    need_tasks("mask", "keypoint")
    manifest = json.loads((exported / "manifest.json").read_text())
    names = {"trace": ["image", "size"], "script": ["images", "sizes"]}
    assert [entry["name"] for entry in manifest["inputs"]] == names[manifest["method"]]
    assert manifest["fixed_devices"] == []
    tasks = ("detection", "mask", "keypoint")
    outputs = {entry["name"]: entry["shape"] for entry in manifest["outputs"] if entry["task"] in tasks}
    assert outputs == {
        "boxes": "(N, 4)",
        "scores": "(N,)",
        "classes": "(N,)",
        "keypoints": "(N, 3, 3)",
        "masks": "(N, H, W)",
    }
    assert manifest["classes"] == ["figure", "disc"]
    assert manifest["keypoints"]["figure"]["names"] == ["left_hand", "right_hand", "head"]
    assert manifest["preprocessing"] == PREPROCESSING


def test_it_runs_without_detectron2_and_without_this_package(
    exported: Path, model: MultiTaskRCNN, images: list[Tensor]
) -> None:
    Image.fromarray(images[0].flip(0).permute(1, 2, 0).numpy()).save(exported / "image.png")
    command = [sys.executable, "-W", "ignore", "-c", BARE]
    done = subprocess.run(command, cwd=exported, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    shapes = {
        output["name"]: output["shape"] for output in json.loads((exported / "manifest.json").read_text())["outputs"]
    }
    expected = model.predict_tensors([images[0]], [torch.tensor(images[0].shape[-2:])])[0]
    assert len(found["boxes"]) == len(expected["boxes"]) > 0
    for name, value in expected.items():
        _check_printed(found[name], value, shapes[name])


def _check_printed(printed: Any, value: Tensor, shape: str) -> None:
    """Values per pixel are told in a few numbers, all others as they are."""
    if not shape.endswith("H, W)"):
        numbers = torch.from_numpy(np.array(printed, dtype=float))  # null becomes NaN
        numbers = numbers.reshape(value.shape) if value.numel() == 0 else numbers
        torch.testing.assert_close(numbers, value, rtol=0, atol=1e-3, check_dtype=False, equal_nan=True)
    elif value.dtype == torch.bool:
        assert printed == value.sum(dim=(1, 2)).tolist()
    elif value.is_floating_point():
        assert printed["mean"] == pytest.approx(float(value.mean()), abs=1e-3)
        assert (printed["least"], printed["greatest"]) == pytest.approx(
            (float(value.min()), float(value.max())), abs=1e-3
        )
    else:
        assert sum(printed["pixels"].values()) == value.numel()
        assert {int(name) for name in printed["pixels"]} == set(value.unique().tolist())


def test_maps_are_told_in_a_few_numbers() -> None:
    ids = torch.tensor([[0, 3, 3], [3, 0, 3]])
    assert summary(ids, "(H, W)") == {"pixels": {0: 2, 3: 4}}
    metres = torch.tensor([[1.0, torch.nan], [3.0, 2.0]])
    assert summary(metres, "(H, W)") == {"least": 1.0, "mean": 2.0, "greatest": 3.0}
    assert summary(metres, "(N, 2)") == [[1.0, None], [3.0, 2.0]], "JSON knows no NaN"
    assert summary(torch.full((2, 2), torch.nan), "(H, W)") == {"least": None, "mean": None, "greatest": None}
    assert summary(torch.ones(2, 3, 4, dtype=torch.bool), "(N, H, W)") == [12, 12]


def test_runtime_resizes_as_the_training_code_does() -> None:
    from detectron2.data.transforms import ResizeShortestEdge

    for height, width in ((100, 80), (37, 211), (64, 64), (900, 33)):
        (transform,) = [ResizeShortestEdge(64, 120).get_transform(torch.zeros(height, width, 3).numpy())]
        assert network_size(height, width, 64, 120) == (transform.new_h, transform.new_w)


def test_exported_network_keeps_the_original_frame(exported: Path) -> None:
    image = make_sample(0, (64, 96), 0)["image"].repeat_interleave(2, dim=1).repeat_interleave(2, dim=2).flip(0)
    prediction = ExportedNetwork(exported)(image)
    assert len(prediction["boxes"]) > 0
    assert prediction["boxes"][:, 2].max() > 96  # beyond the 64 x 96 pixels that the network itself sees
    for entry in json.loads((exported / "manifest.json").read_text())["outputs"]:
        if entry["shape"] == "(N, H, W)":
            assert prediction[entry["name"]].shape[1:] == (128, 192)


def test_a_wrong_file_is_refused_and_nothing_is_written(
    model: MultiTaskRCNN, images: list[Tensor], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def frozen(network: TracedNetwork, case: Case) -> torch.jit.ScriptModule:
        inputs = case.images[0], case.sizes[0]
        with torch.no_grad():
            constant = network(*inputs)
        return torch.jit.trace(lambda image, size: tuple(value + 0 for value in constant), inputs)

    monkeypatch.setattr("mtl_rcnn.export.torchscript.trace_network", frozen)
    with pytest.raises(ExportError, match="case 'size 2', output 'boxes'"):
        export_torchscript(model, LABEL_SPACE, images, tmp_path, PREPROCESSING, {}, min_detections=3)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("output", ["boxes", "scores", "classes"])
def test_certificate_sees_small_differences(model: MultiTaskRCNN, images: list[Tensor], output: str) -> None:
    eager = InferenceNetwork(model)

    def spoilt(images: list[Tensor], sizes: list[Tensor]) -> list[dict[str, Tensor]]:
        *others, found = eager(images, sizes)
        value = found[output].clone()
        value.view(-1)[0] = value.view(-1)[0] + 2e-4 if value.is_floating_point() else 1 - value.view(-1)[0].long()
        return [*others, found | {output: value}]

    case = Case("two", images[:2], [torch.tensor([70, 90]), torch.tensor([90, 70])])
    assert min(certify(eager, eager, [case])[0]["rows"]) > 0
    with pytest.raises(ExportError, match=f"case 'two', output '{output}'"):
        certify(eager, spoilt, [case])


def test_a_certificate_without_a_crowd_is_refused(model: MultiTaskRCNN, images: list[Tensor]) -> None:
    with pytest.raises(ExportError, match="no input with more than 100000 detections"):
        choose_cases(InferenceNetwork(model), images, 100_000, batches=False)
