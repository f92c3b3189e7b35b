"""What docs/cluster.md tells a user to type: the shell reads it, and its configurations compose."""

from __future__ import annotations

import re
import shlex
import shutil
import subprocess

import pytest
from pages import ROOT, read_page
from tiny import need_tasks

from mtl_rcnn.config import compose, config_root
from mtl_rcnn.config.cluster_checks import check_submission
from mtl_rcnn.config.compose import Composition, defaults_of

PAGE = read_page("cluster.md")
BLOCKS = re.findall(r"^```bash\n(.*?)^```", PAGE, flags=re.M | re.S)
COMMANDS = [line for block in BLOCKS for line in block.splitlines() if re.search(r"tools/\w+\.py", line)]
ROOTS = {"train_net.py": "train", "export_model.py": "export"}


def _overrides(command: str) -> tuple[str, list[str]]:
    """Root configuration and overrides of a command, whatever starts it."""
    words = shlex.split(command)
    (at,) = (number for number, word in enumerate(words) if word.startswith("tools/"))
    return ROOTS[words[at].removeprefix("tools/")], words[at + 1 :]


def test_the_page_has_commands() -> None:
    assert not PAGE or len(COMMANDS) >= 8


@pytest.mark.parametrize("block", BLOCKS)
def test_the_shell_reads_every_block(block: str) -> None:
    done = subprocess.run(["bash", "-n"], input=block, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_composes(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    need_tasks("detection", "mask", "keypoint")
    root, overrides = _overrides(command)
    if "-m" not in overrides:
        compose(root, overrides)
        return
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")
    sweep = Composition(root, tuple(word for word in overrides if word != "-m"), str(config_root()), sweep=True)
    check_submission(sweep.load(), sweep.overrides)


def test_the_keys_of_the_cluster_are_the_table_of_the_page() -> None:
    if not PAGE:
        pytest.skip("this copy of the project has no docs")
    table = PAGE.split("| key of `cluster` |")[1].split("\n\n")[0]
    keys = {key for row in re.findall(r"^\| (`.*?`) \|", table, flags=re.M) for key in re.findall(r"`(\w+)`", row)}
    cluster = compose("train", ["cluster=slurm_pyxis", "data.root=unused"], checked=False).cluster
    assert set(cluster) - {"kind"} == keys
    assert list(defaults_of("train").cluster) == ["kind", "timeout_s", "heartbeat_s"]


def test_links_lead_somewhere() -> None:
    for link in re.findall(r"\]\((?!http)([^)#]+)", PAGE):
        assert (ROOT / "docs" / link).exists(), link
