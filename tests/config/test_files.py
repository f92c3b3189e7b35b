"""Faults that stand in configuration files: unknown keys, code that nobody trusts, settings without a use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn import config
from mtl_rcnn.config.checks import check
from mtl_rcnn.config.diff import ABSENT, config_diff, format_diff
from mtl_rcnn.config.resolve import resolve
from mtl_rcnn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

ROOT_YAML = """
defaults:
  - _self_
  - tasks: [a]
  - solver: fast
  - experiment: null
  - override hydra/job_logging: disabled
  - override hydra/hydra_logging: disabled
output_dir: out
weights: {}
hydra: {run: {dir: .}, sweep: {dir: sweep}, output_subdir: null}
"""
TASK = "# @package tasks.{0}\n_target_: mtl_rcnn.tasks.{0}.Task\ndepth: 1\naugment: {{_target_: detectron2.data.A}}\n"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A small configuration folder."""
    folder = tmp_path / "configs"
    for group in ("tasks", "solver", "experiment"):
        (folder / group).mkdir(parents=True)
    (folder / "train.yaml").write_text(ROOT_YAML)
    for name in ("a", "b"):
        (folder / "tasks" / f"{name}.yaml").write_text(TASK.format(name))
    (folder / "solver" / "fast.yaml").write_text("max_iter: 10\nlr: 0.1\n")
    return folder


def experiment(tree: Path, text: str, *overrides: str) -> DictConfig:
    """The configuration with an experiment file of this text, checked."""
    (tree / "experiment" / "mine.yaml").write_text(f"# @package _global_\n{text}\n")
    return config.compose("train", ["experiment=mine", *overrides], tree)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("solver: {max_itr: 3}", r"experiment/mine\.yaml: no key 'solver.max_itr'; did you mean 'solver.max_iter'\?"),
        ("tasks: {a: {dept: 3}}", r"experiment/mine\.yaml: no key 'tasks.a.dept'; did you mean 'tasks.a.depth'\?"),
        ("tasks: {b: {depth: 3}}", r"mine\.yaml sets tasks.b, but the task 'b' is not selected .* ~tasks.b"),
        ("defaults: [{override /solver: fats}]", "no solver 'fats'; did you mean 'fast'"),
        ("solver: {max_iter: 3", r"mine\.yaml, line \d: not valid YAML"),
        ("output_dir: ${nope}", "output_dir: Interpolation key 'nope' not found"),
        ("tasks: {c: {_target_: mtl_rcnn.c.C, k: '???'}}", "tasks.c.k has no value: add tasks.c.k=VALUE"),
        ("tasks: {a: {_target_: os.system}}", "tasks.a._target_=os.system: the package 'os' is not trusted"),
        ("solver: {lr: -1}", "solver.lr=-1: expected a number above 0"),
        (
            "hydra: {callbacks: {x: {_target_: antigravity.C}}}",
            r"hydra.callbacks.x._target_=antigravity.C: the package",
        ),
        ("hydra: {job_logging: {handlers: {x: {class: antigravity.H}}}}", "antigravity.H: the package 'antigravity'"),
        (
            "hydra: {job: {env_set: {MTL_RCNN_TRUST: os}}}",
            "hydra.job.env_set.MTL_RCNN_TRUST: set it in the environment",
        ),
    ],
)
def test_a_fault_in_an_experiment_is_named(tree: Path, text: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        experiment(tree, text)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize(
    "text",
    [
        "solver: {max_iter: 3}",
        "weights: {anything: 1}",  # an empty mapping takes any key
        "tasks: {a: {augment: {size: 3}}}",  # arguments of a class that is not ours are not all listed
        "tasks: {c: {_target_: mtl_rcnn.tasks.c.Task, knob: 1}}",  # a new member brings its own keys
    ],
)
def test_what_an_experiment_may_set(tree: Path, text: str) -> None:
    wanted = OmegaConf.create(text)
    found = experiment(tree, text)
    assert OmegaConf.merge(found, wanted) == found


def test_settings_of_a_deselected_task_can_be_dropped(tree: Path) -> None:
    assert "b" not in experiment(tree, "tasks: {b: {depth: 3}}", "~tasks.b").tasks


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("tasks=[]", r"tasks=\[\]: no task is selected; select at least one \(a, b\)"),
        ("tasks=a,b", r"write a list as tasks=\[a,b\], or add -m"),
        ("max_iter=3", "no key 'max_iter'; did you mean 'solver.max_iter'"),
        ("solver={max_itr:3}", "no key 'solver.max_itr'; did you mean 'solver.max_iter'"),
        ("solver", "cannot read the argument 'solver' as key=value"),
        ("+solver.lr=3", "the key exists; write it without"),
        ("solver.zzz=3", "no key 'solver.zzz'; 'solver' has max_iter, lr"),
        ("hydra.searchpath=[file:///no/such/folder]", "hydra.searchpath: no folder or package /no/such/folder"),
    ],
)
def test_a_fault_on_the_command_line_is_named(tree: Path, override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        config.compose("train", [override], tree)


def test_detectron2_is_trusted_only_where_its_classes_are_asked_for() -> None:
    with pytest.raises(ConfigError, match="package 'detectron2' is not trusted here"):
        resolve("detectron2.no_such_module.Thing", ConfigError, "k")
    with pytest.raises(ConfigError, match="expected the dotted path of a class"):
        resolve("mtl_rcnn; import os", ConfigError, "k")


def test_a_saved_configuration_is_read_back(tree: Path, tmp_path: Path) -> None:
    cfg = config.compose("train", ["output_dir=x${solver.lr}"], tree)
    config.save(cfg, tmp_path / "config.yaml")
    assert config.to_plain(config.load(tmp_path / "config.yaml")) == config.to_plain(cfg)
    assert config.load(tmp_path / "config.yaml").output_dir == "x0.1"
    (tmp_path / "list.yaml").write_text("[1]")
    with pytest.raises(ConfigError, match=r"list\.yaml: expected a YAML mapping"):
        config.load(tmp_path / "list.yaml")
    with pytest.raises(ConfigError, match=r"none\.yaml: cannot read"):
        config.load(tmp_path / "none.yaml")


def test_the_difference_names_causes_and_whole_additions() -> None:
    old = OmegaConf.create({"root": "a", "path": "${root}/x", "gone": 1})
    new = OmegaConf.create({"root": "b", "path": "${root}/x", "new": {"_target_": "m.C", "k": 1}})
    found = config_diff(new, old)
    assert found == [("root", "a", "b"), ("new", ABSENT, {"_target_": "m.C", "k": 1}), ("gone", 1, ABSENT)]
    assert format_diff(found).split("\n") == ["  root: a -> b", "  new: added m.C", "  gone: removed"]
    assert format_diff([]) == "  nothing"


@pytest.mark.parametrize("value", [0, 1.5, True, "3", None])
def test_a_number_out_of_range_is_refused(value: object) -> None:
    with pytest.raises(ConfigError, match=r"solver\.max_iter=.*: expected a whole number of at least 1"):
        check(OmegaConf.create({"solver": {"max_iter": value}}))


SWEEP = """
from mtl_rcnn import config
from mtl_rcnn.errors import DataError

@config.main("train")
def main(cfg):
    if cfg.seed == 4:
        raise DataError("image 3 is broken")
    print("ran", cfg.seed, cfg.output_dir)

main()
"""


def test_a_sweep_runs_all_jobs_in_their_own_folders_and_tells_the_failure(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SWEEP, "-m", "seed=3,4,5", "output_dir=out", f"hydra.sweep.dir={tmp_path}"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 2
    assert done.stdout.split("\n")[:2] == ["ran 3 out/0", "ran 5 out/2"]
    assert done.stderr.strip().endswith("error: image 3 is broken")
