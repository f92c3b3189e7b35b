"""A task has one home: without its Python file and its YAML, the rest trains, is evaluated, exported, and passes
its tests."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import available_tasks

ROOT = Path(__file__).resolve().parents[1]
OPTIONAL = [name for name in available_tasks() if name != "detection"]
LEFT_OUT = (
    "test_detectron2_build.py",
    "test_deleted_task.py",
    "test_added_task.py",
    "test_tools.py",
    "test_readme.py",
    "test_packaging.py",
    "test_benchmarks.py",
    "test_joint_against_single.py",
    "test_doctor.py",
    "test_cpp.py",
    "test_bad_input.py",
    "test_fuzz.py",
    "engine",
    "data",
    "evaluation",
)
"""Tests that no task takes part in, that are about these three tasks together, or that would take too long to run once
more."""


@pytest.mark.slow
@pytest.mark.parametrize("task", OPTIONAL)
def test_the_project_stands_without(task: str, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    for folder in ("mtl_rcnn", "configs", "tools", "tests", "datasets", "third_party"):
        shutil.copytree(
            ROOT / folder, copy / folder, ignore=shutil.ignore_patterns("__pycache__", "shape_scenes", "coco")
        )
    for file in ("pyproject.toml", "setup.py", "README.md"):
        shutil.copy(ROOT / file, copy)
    (copy / "mtl_rcnn" / "tasks" / f"{task}.py").unlink()
    (copy / "configs" / "tasks" / f"{task}.yaml").unlink()
    (copy / "tests" / "tasks" / f"test_{task}.py").unlink(missing_ok=True)
    environment = {**os.environ, "PYTHONPATH": str(copy), "MTL_RCNN_TEST_WITHOUT": task}
    ignored = [f"--ignore=tests/{name}" for name in LEFT_OUT]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "not slow", "-p", "no:cacheprovider", "-p", "no:xdist", *ignored],
        cwd=copy,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    passed = int(re.search(r"(\d+) passed", done.stdout)[1])
    assert passed > 60
    assert f"mtl_rcnn/tasks/{task}.py" not in done.stdout
