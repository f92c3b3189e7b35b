"""What `cluster` may say, and sweeps that the submitit launcher would hand in in vain; no SLURM is needed."""

from __future__ import annotations

import importlib.util
import re
import shutil
from pathlib import Path

import pytest

from mtl_rcnn.config import compose, config_root
from mtl_rcnn.config.cluster_checks import check_submission
from mtl_rcnn.config.compose import Composition
from mtl_rcnn.errors import ConfigError

SWEEP = ["hydra/launcher=submitit_slurm", "cluster=slurm", "seed=1,2"]
PYXIS = ["cluster=slurm_pyxis", "cluster.container_image=a.sqsh", "cluster.container_mounts=/shared:/shared"]


def submit(*overrides: str, config_dir: Path | None = None) -> dict[str, object]:
    """The launcher's arguments after the checks of a sweep."""
    composition = Composition(
        "train", overrides, str(config_root()), str(config_dir) if config_dir else None, sweep=True
    )
    whole = composition.load()
    check_submission(whole, composition.overrides)
    return dict(whole.hydra.launcher)


@pytest.fixture
def slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine from which jobs can be handed in."""
    monkeypatch.setattr(shutil, "which", lambda name: f"/usr/bin/{name}")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["cluster=slrm"], "no cluster 'slrm'; did you mean 'slurm'"),
        (["cluster.nodes=2"], "no key 'cluster.nodes'"),
        (["cluster=slurm", "cluster.kind=mpi"], "cluster.kind=mpi: expected local or slurm"),
        (["cluster.timeout_s=0"], "cluster.timeout_s=0: expected a number of seconds above 0"),
        (["cluster.heartbeat_s=soon"], "cluster.heartbeat_s=soon: expected null or a number of seconds above 0"),
        (["cluster=slurm", "cluster.nodes=0"], "cluster.nodes=0: expected a whole number of at least 1"),
        (
            ["cluster=slurm", "cluster.gpus_per_node=many"],
            "cluster.gpus_per_node=many: expected null or a whole number",
        ),
        (
            ["cluster=slurm", "cluster.gpus_per_node=null"],
            "cluster.tasks_per_node=None: .*; give it where gpus_per_node",
        ),
        (["cluster=slurm", "cluster.srun_args=[touch, x]"], r"cluster.srun_args: 'touch' is not among the options"),
        (["cluster=slurm", "cluster.srun_args=['--task-prolog=x']"], "'--task-prolog=x' is not among the options"),
        (["cluster=slurm_pyxis"], "cluster.container_image has no value: add cluster.container_image=VALUE"),
    ],
)
def test_a_cluster_that_cannot_be_asked_for_is_told(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        compose("train", ["data.root=unused", *overrides])


def test_the_keys_of_the_cluster_reach_the_launcher(slurm: None) -> None:
    wanted = {"partition": "gpu", "account": "me", "constraint": "a100|h100", "nodes": 2, "gpus_per_node": 8}
    wanted |= {"cpus_per_task": 6, "mem_gb": 400, "timeout_min": 90}
    launcher = submit(*SWEEP, *(f"cluster.{key}='{value}'" if isinstance(value, str) else f"cluster.{key}={value}"
                                for key, value in wanted.items()))  # fmt: skip
    assert {key: launcher[key] for key in wanted} == wanted
    assert launcher["tasks_per_node"] == 8, "a rank for each GPU"
    assert launcher["srun_args"] == []
    assert submit(*SWEEP, *PYXIS)["srun_args"] == ["--container-image=a.sqsh", "--container-mounts=/shared:/shared"]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["hydra/launcher=submitit_slurm"], "add cluster=slurm"),
        ([*SWEEP, "cluster.nodes=1,2"], "cluster.nodes=1,2: the jobs of a sweep are handed in together"),
        ([*SWEEP, "cluster.nodes=0"], "cluster.nodes=0: expected"),
        ([*SWEEP, "cluster=slurm_pyxis"], "cluster.container_image has no value: add"),
        ([*SWEEP, 'cluster.partition="a\nrm"'], r"hydra.launcher.partition='a\\nrm': expected text of one line"),
        ([*SWEEP, "+hydra.launcher.setup=[reboot]"], "hydra.launcher.setup: a configuration runs no commands"),
    ],
)
def test_a_sweep_is_checked_before_it_is_handed_in(overrides: list[str], said: str, slurm: None) -> None:
    with pytest.raises(ConfigError, match=said):
        submit(*overrides)


def test_an_experiment_cannot_give_the_job_commands(slurm: None, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "evil.yaml").write_text("# @package _global_\nhydra: {launcher: {teardown: [reboot]}}\n")
    with pytest.raises(ConfigError, match=r"hydra\.launcher\.teardown"):
        submit(*SWEEP, "experiment=evil", config_dir=tmp_path)


@pytest.mark.parametrize(
    ("overrides", "folder"),
    [
        (["cluster=slurm"], "outputs/slurm_77_1"),
        (PYXIS, "outputs/slurm_77_1"),
        (["cluster=slurm", "experiment=ours"], "of the experiment"),
        (["cluster=slurm", "experiment=ours", "output_dir=mine"], "mine"),
    ],
)
def test_a_requeued_job_finds_its_run_again(
    overrides: list[str], folder: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "77")
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "ours.yaml").write_text("# @package _global_\noutput_dir: of the experiment\n")
    words = ("data.root=unused", *overrides)
    assert Composition("train", words, str(config_root()), str(tmp_path)).checked().output_dir == folder
    alone = compose("train", ["data.root=unused"]).output_dir  # torchrun's variables do not tell one start from another
    assert re.fullmatch(r"outputs/[\d-]{10}_[\d-]{8}", alone)


def test_without_a_job_the_folder_is_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("SLURM_JOB_ID", "SLURM_STEP_ID"):
        monkeypatch.delenv(name, raising=False)
    folder = compose("train", ["data.root=unused", "cluster=slurm"]).output_dir
    assert re.fullmatch(r"outputs/slurm_[\d-]{10}_[\d-]{8}_0", folder)


def test_what_is_not_installed_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ConfigError, match="there is no sbatch here"):
        submit(*SWEEP)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"not installed; pip install 'mtl-rcnn\[cluster\]'"):
        submit(*SWEEP)
