"""The house rules that a machine can check: who imports whom, where a task is named, how long the entry script is."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from tiny import available_tasks

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "mtl_rcnn"

ORDER = (
    "config",
    "data",
    "evaluation",
    "modeling",
    "visualize",
    "tasks",
    "balancing",
    "engine",
    "export",
    "predict",
    "comparison",
)
"""A folder imports only itself and what stands before it. `data` and `evaluation` name the canvas in type hints
alone."""


@pytest.mark.parametrize("folder", ORDER)
def test_folders_import_only_what_stands_before_them(folder: str) -> None:
    allowed = {*ORDER[: ORDER.index(folder) + 1], "errors", "runtime"}
    for path in (PACKAGE / folder).rglob("*.py"):
        for module in _imports(ast.parse(path.read_text(encoding="utf-8"))):
            if module.startswith("mtl_rcnn."):
                assert module.split(".")[1] in allowed, f"{path.relative_to(ROOT)} imports {module}"


def test_configuration_imports_no_torch() -> None:
    for path in (PACKAGE / "config").glob("*.py"):
        assert not {"torch", "detectron2"} & {m.split(".")[0] for m in _imports(ast.parse(path.read_text()))}, path


def test_the_package_itself_imports_nothing() -> None:
    assert not list(_imports(ast.parse((PACKAGE / "__init__.py").read_text())))


@pytest.mark.parametrize("task", available_tasks())
def test_a_task_is_named_in_its_own_file_alone(task: str) -> None:
    homes = {path for path in PACKAGE.rglob("*.py") if path.parent.name == "tasks" and path.stem == task}
    assert homes, f"no file of task {task}"
    scripts = [*PACKAGE.rglob("*.py"), *(ROOT / "tools").glob("*.py")]
    for path in scripts:
        if path not in homes:
            assert task not in _literals(path), f"{path.relative_to(ROOT)} names the task {task}"


def test_the_training_script_is_short() -> None:
    assert len((ROOT / "tools" / "train_net.py").read_text().splitlines()) <= 100


def _imports(tree: ast.AST) -> list[str]:
    """Modules imported at run time: what stands under `if TYPE_CHECKING` does not count."""
    found: list[str] = []
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            found += [name.name for name in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append(node.module or "")
        found += _imports(node)
    return found


def _literals(path: Path) -> set[str]:
    """String literals of a file. Identifiers may be words of the field (a canvas draws masks); docstrings and
    comments may say anything."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
