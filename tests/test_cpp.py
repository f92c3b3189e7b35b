"""The C++ program of examples/cpp, built here against the installed torch: the same detections as Python's."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image
from reference import randomise_statistics
from tiny import LABEL_SPACE, available_tasks, make_sample, tiny_model

from mtl_rcnn.export.certificate import Case
from mtl_rcnn.export.manifest import build_manifest
from mtl_rcnn.export.scripting import script_network
from mtl_rcnn.export.torchscript import TracedNetwork, trace_network
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "examples" / "cpp" / "build_and_compare.py"
PREPROCESSING = {"short_edge": 80, "max_size": 120, "channel_order": "BGR"}


@pytest.fixture(scope="module")
def example() -> ModuleType:
    spec = spec_from_file_location("build_and_compare", SCRIPT)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def build(example: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the tests build; the first to come compiles."""
    if missing := example.missing_tools():
        pytest.skip(f"this machine has no {' and no '.join(missing)}")
    return tmp_path_factory.mktemp("build")


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("images")
    for index, size in enumerate([(64, 96), (150, 90), (100, 230)]):
        pixels = make_sample(index, size, 0)["image"].permute(1, 2, 0).numpy()
        Image.fromarray(pixels).save(folder / f"{index}.png")
    return sorted(folder.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize("method", ["trace", "script"])
def test_the_program_finds_what_python_finds(method: str, build: Path, images: list[Path], tmp_path: Path) -> None:
    model = tiny_model(available_tasks(), "tasks.detection.score_thresh=0.3")
    randomise_statistics(model, seed=4)
    for threshold, fewest, most in ((0.3, 20, 300), (1.0, 0, 0)):  # detections, and none at all
        model.roi_heads.detector.score_thresh = threshold
        write_export(model, method, tmp_path)
        done = compare(tmp_path / "model.ts", images, build)
        assert done.returncode == 0, done.stdout + done.stderr
        said = re.search(r"(\d+) detections on 3 images, largest difference from Python (\S+)", done.stdout)
        assert fewest <= int(said[1]) <= most
        assert float(said[2]) <= 1e-4


def write_export(model: MultiTaskRCNN, method: str, folder: Path) -> None:
    """`model.ts` and the part of the manifest that the runtime reads."""
    network = InferenceNetwork(model.eval())
    image = make_sample(0, (80, 120), 0)["image"]
    case = Case("", [image], [torch.tensor([80, 120])])
    module = script_network(model, network) if method == "script" else trace_network(TracedNetwork(model), case)
    module.save(str(folder / "model.ts"))
    manifest = build_manifest(model, network.names, LABEL_SPACE, method, PREPROCESSING, {})
    (folder / "manifest.json").write_text(json.dumps(manifest))


def compare(model: Path, images: list[Path], build: Path) -> subprocess.CompletedProcess:
    """Runs the example's script as a user does."""
    command = [sys.executable, "-W", "ignore", str(SCRIPT), "--build", str(build), str(model), *map(str, images)]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


@pytest.mark.slow
def test_the_program_says_what_is_wrong(example: ModuleType, build: Path, tmp_path: Path) -> None:
    program = str(example.build(build))
    write_export(tiny_model(available_tasks()).eval(), "trace", tmp_path)
    (tmp_path / "short.ppm").write_bytes(b"P6 4 4 255\nxyz")
    model, library = str(tmp_path / "model.ts"), str(example.operators())
    for words, expected in (
        ([model], "usage: detect MODEL"),
        ([model, library, "--short-edge"], "--short-edge needs a number"),
        ([model, str(tmp_path / "none.so"), "x.ppm"], "none.so"),
        ([model, library, str(tmp_path / "short.ppm")], "short.ppm: the file ends before its last pixel"),
        ([model, library, model], "model.ts: expected a P6 PPM"),
    ):
        done = subprocess.run([program, *words], capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 1
        assert expected in done.stderr


def test_a_difference_is_seen(example: ModuleType) -> None:
    expected = {
        "boxes": torch.tensor([[1.0, 2.0, 3.0, 4.0]]),
        "scores": torch.tensor([0.5]),
        "classes": torch.tensor([1]),
    }
    same = {"box": [1.0, 2.0, 3.0, 4.0], "score": 0.5, "class": 1}
    assert example.difference(expected, [same]) == 0
    assert example.difference(expected, [same | {"score": 0.75}]) == 0.25
    assert example.difference(expected, [same | {"class": 0}]) == float("inf")
    assert example.difference(expected, []) == float("inf")
