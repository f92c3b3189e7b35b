"""The commands of docs/compare-tasks.md compose."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from tiny import need_tasks

from mtl_rcnn.config import compose

PAGE = Path(__file__).resolve().parents[2] / "docs" / "compare-tasks.md"
COMMANDS = (
    re.findall(r"^    python tools/compare_tasks\.py (.*)$", PAGE.read_text(encoding="utf-8"), flags=re.M)
    if PAGE.is_file()
    else []
)


@pytest.mark.parametrize("command", COMMANDS)
def test_command(command: str) -> None:
    need_tasks("detection", "mask", "keypoint", "semantic", "depth", "image_label")
    assert compose("compare", shlex.split(command)).seeds == 3


def test_there_are_commands() -> None:
    if not PAGE.is_file():
        pytest.skip("this copy of the project has no docs")
    assert len(COMMANDS) == 4
