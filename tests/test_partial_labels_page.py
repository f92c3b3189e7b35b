"""Every command of docs/partial-labels.md runs, one after the other, on a few scenes and for a few steps."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import need_tasks

ROOT = Path(__file__).resolve().parents[1]
PAGE = (ROOT / "docs" / "partial-labels.md").read_text(encoding="utf-8")
COMMANDS = [line for line in PAGE.splitlines() if line.startswith("python ")]
STEPS = [
    *("device=cpu", "threads=1", "data.workers=0", "solver.max_iter=2", "solver.batch_size=4", "solver.steps=[]"),
    *("solver.checkpoint_period=0", "data.val=[]", "report.enabled=false", "evaluation.samples=0"),
]
SMALLER = {
    "shape_scenes.py": ["--train", "6", "--val", "2"],
    "train_net.py": STEPS,
    "check_data.py": [*STEPS, "dry_run=false"],
    "pseudo_label.py": ["device=cpu", "workers=0", "threshold=0.1", "+thresholds.semantic=0.1"],
}
"""What a test puts in place of a command's own arguments of these names, lest it take hours."""


def run(command: str, folder: Path) -> str:
    """Runs a line of the page in a folder."""
    _, script, *given = shlex.split(command)
    smaller = SMALLER[Path(script).name]
    replaced = [word.split("=")[0] for word in smaller if "=" in word]  # of options, the later one counts
    kept = [word for word in given if word.split("=")[0] not in replaced]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(ROOT / script), *kept, *smaller],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, f"{command}\n{done.stdout[-2000:]}{done.stderr[-3000:]}"
    return done.stdout


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    need_tasks("detection", "mask", "keypoint", "semantic", "depth")
    assert len(COMMANDS) == 8
    said = [run(command, tmp_path) for command in COMMANDS]
    assert "boxes" in said[3]
    outputs = tmp_path / "outputs"
    folders = {"partial", "partial_labels", "partial_temperature", "partial_maps", "partial_pseudo", "partial_second"}
    assert {path.name for path in outputs.iterdir()} == folders
    (entry,) = yaml.safe_load((outputs / "partial_pseudo" / "dataset.yaml").read_text())
    assert entry["annotations"] == "outputs/partial_pseudo/annotations.json"
    images = json.loads((outputs / "partial_pseudo" / "annotations.json").read_text())["images"]
    assert all({"depth", "semantic"} <= {*image["pseudo"]} for image in images)
    assert "tasks" not in entry  # whatever the file carries
    for image in images:
        assert (outputs / "partial" / "plain" / "train" / image["depth_file_name"]).is_file()


def test_the_examples_are_yaml_and_name_what_there_is() -> None:
    (block,) = re.findall(r"```yaml\n(.*?)```", PAGE, flags=re.S)
    entries = yaml.safe_load(block)["data"]["train"]
    experiment = yaml.safe_load((ROOT / "configs" / "experiment" / "partial_labels.yaml").read_text())
    named = [{key: entry[key] for key in ("name", "tasks", "classes") if key in entry} for entry in entries]
    theirs = experiment["data"]["train"]
    assert named == [{key: entry[key] for key in ("name", "tasks", "classes") if key in entry} for entry in theirs]
    for path in re.findall(r"docs/adr/[\w-]+\.md", PAGE):
        assert (ROOT / path).is_file()
