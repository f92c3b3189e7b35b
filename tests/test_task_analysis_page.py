"""Every command of docs/task-analysis.md runs, one after the other, on a few scenes and for a few steps."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import NETWORK, TASKS, need_tasks

ROOT = Path(__file__).resolve().parents[1]
FILE = ROOT / "docs" / "task-analysis.md"
PAGE = FILE.read_text(encoding="utf-8") if FILE.is_file() else ""
COMMANDS = re.findall(r"^python .*$|(?<=`)python [^`]*(?=`)", PAGE, flags=re.M)
STEPS = [
    *("device=cpu", "threads=1", "data.workers=0", "solver.max_iter=4", "solver.batch_size=2", "solver.steps=[]"),
    *("data.val=[]", "report.enabled=false", "solver.warmup_iters=0", "analysis.every=2"),
    *(*NETWORK, *TASKS["detection"], *TASKS["mask"], *TASKS["keypoint"]),
]
SMALLER = {
    "shape_scenes.py": ["--train", "6", "--val", "2"],
    "train_net.py": STEPS,
    "analyze_tasks.py": ["device=cpu", "workers=0", "batches=6"],
    "analysis_overhead.py": ["data.workers=0", *STEPS[4:], "--every", "2", "--turns", "1", "--threads", "1"],
}
"""What a test puts in place of a command's own arguments of these names, lest it take hours."""


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    need_tasks("detection", "mask", "keypoint")
    scripts = [Path(command.split()[1]).name for command in COMMANDS]
    assert scripts == list(SMALLER)
    said = {script: _run(command, tmp_path) for script, command in zip(scripts, COMMANDS)}
    assert "detection and mask" in said["analyze_tasks.py"]
    assert "time over plain" in said["analysis_overhead.py"]
    made = {path.name for path in (tmp_path / "outputs" / "shapes" / "task_analysis").iterdir()}
    assert made == {*re.findall(r"`(\w+\.(?:txt|png|csv))`", PAGE)}


def test_links_lead_somewhere() -> None:
    if not PAGE:
        pytest.skip("this copy of the project has no docs")
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target


def _run(command: str, folder: Path) -> str:
    _, script, *given = shlex.split(command)
    smaller = SMALLER[Path(script).name]
    replaced = [word.split("=")[0] for word in smaller if "=" in word]
    words = [*(word for word in given if word.split("=")[0] not in replaced), *smaller]
    words.sort(key=lambda word: "=" not in word)  # options follow the configuration's keys
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
