"""What the README tells a newcomer to type exists and composes. Whether the tools work: tests/test_tools.py."""

from __future__ import annotations

import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mtl_rcnn.config import compose

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONFIGS = {
    "train_net.py": "train",
    "evaluate.py": "evaluate",
    "export_model.py": "export",
    "predict.py": "predict",
    "visualize_data.py": "visualize_data",
    "check_data.py": "check",
    "pseudo_label.py": "pseudo_label",
    "compare_tasks.py": "compare",
    "analyze_tasks.py": "analyze_tasks",
    "plan.py": "plan",
}
COMMANDS = [
    line.split("#")[0].strip()
    for block in re.findall(r"```\n(.*?)```", README, flags=re.S)
    for line in block.splitlines()
    if line.startswith(("make ", "python ", "torchrun "))
]


def test_there_are_commands() -> None:
    assert len(COMMANDS) >= 10


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    words = shlex.split(command)
    if words[0] == "make":
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.M)
        return
    if words[:2] == ["python", "-m"]:
        assert importlib.util.find_spec(words[2]) is not None
        return
    script = next(word for word in words if word.endswith(".py"))
    if script.startswith("outputs/"):
        assert Path(script).name == "runtime.py"
        return
    assert (ROOT / script).is_file()
    if Path(script).name in CONFIGS:
        compose(CONFIGS[Path(script).name], words[words.index(script) + 1 :])


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\(([^)#]+)", README):
        if not target.startswith("http"):
            assert (ROOT / target).exists(), target
