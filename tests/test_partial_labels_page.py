"""Every command of docs/partial-labels.md runs, one after the other, on a few scenes and for a few steps."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import yaml
from pages import ROOT, commands_of, read_page, run_smaller
from tiny import need_tasks

PAGE = read_page("partial-labels.md")
COMMANDS = commands_of(PAGE)
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


@pytest.mark.slow
def test_every_command_of_the_page_runs(tmp_path: Path) -> None:
    need_tasks("detection", "mask", "keypoint", "semantic", "depth")
    assert len(COMMANDS) == 8
    said = [run_smaller(command, tmp_path, SMALLER) for command in COMMANDS]
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
