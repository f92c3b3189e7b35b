"""A task has one home: without its Python file and its YAML, the rest trains, is evaluated, exported, and passes
the tests of all tasks; other test files that name the task can be read."""

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
ALWAYS = (
    "config/test_config.py",
    "test_structure.py",
    "test_task_contract.py",
    "test_export.py",
    "test_train.py::test_a_run_leaves_everything_it_promises",
)
"""Tests of all tasks that there are: composition, contract, one run with its evaluation, export."""

LEFT_OUT = (
    "test_detectron2_build.py",
    "test_deleted_task.py",
    "test_added_task.py",
    "test_all_tasks.py",
    "test_tools.py",
    "test_readme.py",
    "test_partial_labels_page.py",
    "test_task_analysis_page.py",
    "test_packaging.py",
    "test_benchmarks.py",
    "test_joint_against_single.py",
    "test_cpp.py",
    "test_bad_input.py",
    "test_fuzz.py",
)
"""Tests of what is not in the copy, or that would take too long to run once more."""


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
    naming = _naming(task, copy)
    of_tasks = [name for name in naming if name.startswith("tests/tasks/")]
    done = _pytest(["-m", "not slow", *(f"tests/{name}" for name in ALWAYS), *of_tasks], copy, environment)
    passed = int(re.search(r"(\d+) passed", done)[1])
    assert passed > 60
    assert f"mtl_rcnn/tasks/{task}.py" not in done
    elsewhere = [name for name in naming if name not in of_tasks]
    if elsewhere:  # without a name, every file would be read, also those of what is not in the copy
        _pytest(["--collect-only", *elsewhere], copy, environment)


def _pytest(arguments: list[str], folder: Path, environment: dict[str, str]) -> str:
    """What a run of these tests prints; it must succeed."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-6000:]
    return done.stdout


def _naming(task: str, copy: Path) -> list[str]:
    """The other test files in which the task's name stands as one, or in a helper of theirs. A file that never names it
    cannot miss it."""
    named = re.compile(rf"""['"\[,]{task}['"\],=:/]|tasks[./]{task}\b""")
    files = {path.stem: path for path in (copy / "tests").rglob("*.py") if path.stem not in ("tiny", "toy")}
    text = {stem: path.read_text(encoding="utf-8") for stem, path in files.items()}
    helpers = {
        stem: [name for name in re.findall(r"^from (?:tests\.)?(\w+) import", found, re.M) if name in files]
        for stem, found in text.items()
    }
    always = {Path(name.partition("::")[0]).stem for name in ALWAYS}
    return sorted(
        str(path.relative_to(copy))
        for stem, path in files.items()
        if path.name.startswith("test_") and stem not in always and path.name not in LEFT_OUT
        if path.parent.name != "config"
        if any(named.search(text[name]) for name in (stem, *helpers[stem]))
    )
