"""Builds the C++ program, runs an exported network with it, and compares its detections with Python's.

python examples/cpp/build_and_compare.py outputs/demo/model.ts image.jpg other.png
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torchvision
from torch import Tensor

from mtl_rcnn.runtime import ExportedNetwork

TOLERANCE = 1e-4
HERE = Path(__file__).resolve().parent


def main() -> None:
    """Exits with 1 where a detection differs by more than 1e-4 or something is missing, and says what."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", type=Path, help="an exported model.ts with manifest.json beside it")
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--build", type=Path, default=HERE / "build", help="folder to build in")
    arguments = parser.parse_args()
    if missing := missing_tools():
        sys.exit(
            f"cannot build: {', '.join(missing)} not found; install a C++20 compiler and CMake (pip install cmake)"
        )
    program = build(arguments.build)
    network = ExportedNetwork(arguments.model)
    images = [network.read(path) for path in arguments.images]
    found = run(program, arguments.model, network.manifest["preprocessing"], images, arguments.build)
    worst = max(difference(*pair) for pair in zip(network.batch(images), found, strict=True))
    print(f"{sum(map(len, found))} detections on {len(images)} images, largest difference from Python {worst:.3g}")
    if not worst <= TOLERANCE:
        sys.exit(f"C++ and Python differ by more than {TOLERANCE}")


def missing_tools() -> list[str]:
    """What a build needs and this machine lacks."""
    compilers = [os.environ.get("CXX", ""), "c++", "g++", "clang++"]
    found = {
        "cmake": shutil.which("cmake"),
        "a C++ compiler": next(filter(shutil.which, filter(None, compilers)), None),
    }
    return [name for name, path in found.items() if path is None]


def build(folder: Path) -> Path:
    """The program, built in `folder` against the torch that this Python imports."""
    root = Path(torch.utils.cmake_prefix_path).parents[1]
    started = time.perf_counter()
    for step in (
        ["cmake", "-S", str(HERE), "-B", str(folder), f"-DTORCH_ROOT={root}", "-DCMAKE_BUILD_TYPE=Release"],
        ["cmake", "--build", str(folder)],
    ):
        done = subprocess.run(step, capture_output=True, text=True, check=False)
        if done.returncode:
            sys.exit(f"{' '.join(step)}\n{done.stdout[-4000:]}{done.stderr[-4000:]}")
    print(f"built {folder / 'detect'} in {time.perf_counter() - started:.0f} s")
    return folder / "detect"


def run(
    program: Path, model: Path, preprocessing: dict[str, Any], images: Sequence[Tensor], folder: Path
) -> list[list[dict[str, Any]]]:
    """What the program finds on (3, H, W) uint8 RGB images, per image."""
    paths = [folder / f"{index}.ppm" for index in range(len(images))]
    for path, image in zip(paths, images):
        header = f"P6 {image.shape[2]} {image.shape[1]} 255\n".encode()
        path.write_bytes(header + image.permute(1, 2, 0).contiguous().numpy().tobytes())
    options = ["--bgr"] if preprocessing["channel_order"] == "BGR" else []
    if preprocessing["short_edge"] is not None:
        options += ["--short-edge", str(preprocessing["short_edge"]), "--max-size", str(preprocessing["max_size"])]
    command = [str(program), str(model), str(operators()), *options, *map(str, paths)]
    clean = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LD_"))}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=clean)
    if done.returncode:
        sys.exit(f"{' '.join(command)}\nended with {done.returncode}: {done.stderr}")
    return [json.loads(line)["detections"] for line in done.stdout.splitlines()]


def operators() -> Path:
    """The library of torchvision's operators."""
    (library,) = Path(torchvision.__file__).parent.glob("_C*.so")
    return library


def difference(expected: dict[str, Tensor], found: Sequence[dict[str, Any]]) -> float:
    """Largest difference of boxes and scores of one image; infinite for another number, order or class."""
    if len(found) != len(expected["boxes"]) or [row["class"] for row in found] != expected["classes"].tolist():
        return float("inf")
    if not found:
        return 0.0
    rows = torch.tensor([[*row["box"], row["score"]] for row in found], dtype=torch.float64)
    truth = torch.cat([expected["boxes"], expected["scores"][:, None]], dim=1).double()
    return float((rows - truth).abs().max())


if __name__ == "__main__":
    main()
