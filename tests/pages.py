"""The commands that a page of docs/ gives its reader, run as they stand but for what would take hours."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def read_page(name: str) -> str:
    """The text of docs/<name>; empty in a copy of the project without docs."""
    page = ROOT / "docs" / name
    return page.read_text(encoding="utf-8") if page.is_file() else ""


def commands_of(page: str) -> list[str]:
    """What it says to type, in its order: lines, and code within sentences, that start with `python`."""
    found = re.findall(r"^ *(python .*)$|(?<=`)(python [^`]*)(?=`)", page, flags=re.M)
    return [line or code for line, code in found]


def run_smaller(command: str, folder: Path, smaller: Mapping[str, Sequence[str]]) -> str:
    """Runs a command of a page in a folder and gives what it printed; it must succeed.

    Args:
        smaller: script -> words that replace the command's own of the same key, or follow them.
    """
    _, script, *given = shlex.split(command)
    instead = smaller[Path(script).name]
    replaced = [word.split("=")[0] for word in instead if "=" in word]
    words = [*(word for word in given if word.split("=")[0] not in replaced), *instead]
    words.sort(key=lambda word: "=" not in word)  # options follow the configuration's keys; of two, the later counts
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / script), *words],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout
