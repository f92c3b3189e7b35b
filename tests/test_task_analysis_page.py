"""Every command of docs/task-analysis.md runs, one after the other, on a few scenes and for a few steps."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from pages import ROOT, commands_of, read_page, run_smaller
from tiny import NETWORK, TASKS, need_tasks

PAGE = read_page("task-analysis.md")
COMMANDS = commands_of(PAGE)
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
    said = {script: run_smaller(command, tmp_path, SMALLER) for script, command in zip(scripts, COMMANDS)}
    assert "detection and mask" in said["analyze_tasks.py"]
    assert "time over plain" in said["analysis_overhead.py"]
    made = {path.name for path in (tmp_path / "outputs" / "shapes" / "task_analysis").iterdir()}
    assert made == {*re.findall(r"`(\w+\.(?:txt|png|csv))`", PAGE)}


def test_links_lead_somewhere() -> None:
    if not PAGE:
        pytest.skip("this copy of the project has no docs")
    for target in re.findall(r"\]\(([^)#]+)", PAGE):
        assert (ROOT / "docs" / target).is_file(), target
