"""The wheel of this project, unpacked far from the clone: configurations travel with it, and it trains."""

from __future__ import annotations

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from tiny import NETWORK, TASKS
from toy import Toy

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.slow
def test_a_wheel_trains_from_outside_the_clone(toy: Toy, tmp_path: Path) -> None:
    build = ["-m", "pip", "wheel", "--no-build-isolation", "--no-deps", "--wheel-dir", str(tmp_path), str(ROOT)]
    _run(build, tmp_path)
    (wheel,) = tmp_path.glob("mtl_rcnn-*.whl")
    installed = tmp_path / "installed"
    with zipfile.ZipFile(wheel) as archive:
        names = archive.namelist()
        archive.extractall(installed)
    assert "mtl_rcnn/configs/train.yaml" in names
    assert "mtl_rcnn/configs/tasks/detection.yaml" in names
    assert not [name for name in names if name.startswith(("tests/", "tools/", "third_party/"))]
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    script = "import mtl_rcnn, sys; print(mtl_rcnn.__file__); from mtl_rcnn.console import train; train()"
    train = [
        *("-c", script, "data.root=unused", f"data.train=[{data}]", f"output_dir={tmp_path / 'run'}", "device=cpu"),
        *(*NETWORK, *TASKS["detection"], "solver.batch_size=2", "solver.max_iter=1", "solver.steps=[]", "data.val=[]"),
        *("data.train_augment.resize.short_edge_length=[48]", "data.workers=0", "solver.checkpoint_period=0"),
    ]
    said = _run(train, tmp_path, PYTHONPATH=str(installed))
    assert str(installed) in said
    assert (tmp_path / "run" / "model_0000001.pth").is_file()


def _run(command: list[str], folder: Path, **environment: str) -> str:
    done = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout
