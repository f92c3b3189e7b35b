"""Mistakes in a configuration are told in one line, before torch is imported; a YAML runs no code of its choice."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from detectron2.data.transforms import RandomFlip
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config import compose, config_root
from mtl_rcnn.config.diff import config_diff
from mtl_rcnn.config.resolve import resolve
from mtl_rcnn.config.trust import take_trust_flags
from mtl_rcnn.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]

TOOL = """
import sys
from mtl_rcnn import config
from mtl_rcnn.errors import DataError

@config.main("train")
def main(cfg):
    if cfg.seed == 7:
        raise DataError("image 3 is broken")
    print("ran", cfg.seed)

try:
    main()
finally:
    print("torch imported:", "torch" in sys.modules)
"""


def run_tool(*arguments: str) -> tuple[int, str, str]:
    done = subprocess.run(
        [sys.executable, "-c", TOOL, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False
    )
    return done.returncode, done.stdout, done.stderr


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("solver.max_itr=5", "no key 'solver.max_itr'; did you mean 'solver.max_iter'?"),
        (
            "checkpoint.graft.mask=a.pkl",
            "checkpoint.graft has no entry 'mask' yet; add it with +checkpoint.graft.mask=a.pkl",
        ),
        ("checkpoint.graft={mask:a.pkl}", "add it with +checkpoint.graft.mask=..."),
        ("modle=resnet50_fpn", "no key 'modle'; did you mean 'model'?"),
        ("model=resnet51", "no model 'resnet51'; did you mean 'resnet50_fpn'?"),
        ("tasks=[detektion]", "no tasks 'detektion'; did you mean 'detection'? available: "),
        ("tasks.mask.norm=GN", "the task 'mask' is not selected"),
        ("+tasks.mask.norm=GN", "the task 'mask' is not selected"),
        ("solver.max_iter=0", "solver.max_iter=0: expected a whole number of at least 1"),
        ("solver.optimizer=adam", "solver.optimizer=adam: expected sgd or adamw"),
        ("solver.betas=[0.9]", "solver.betas=[0.9]: expected two numbers of at least 0 and below 1"),
        ("solver.layer_decay=1.5", "solver.layer_decay=1.5: expected null or a number above 0 and at most 1"),
        ("+solver.lr_factors.trnk=2", "solver.lr_factors: the network has no part 'trnk'; did you mean 'trunk'?"),
        ("+solver.lr_factors.trunk=0", "solver.lr_factors.trunk=0: expected a number above 0"),
        ("solver.accumulate=3", "solver.accumulate=3: solver.batch_size=16 images cannot be cut into 3 micro-batches"),
        ("solver.ema=1", "solver.ema=1: expected null or a number of at least 0 and below 1"),
        (
            "solver.max_iter=12epochs",
            "solver.max_iter=12epochs: expected a whole number of at least 1, or epochs such as",
        ),
        ("solver.reference_batch_size=0", "solver.reference_batch_size=0: expected null or a whole number"),
        ("solver.early_stop.metric=AP", "solver.early_stop.metric=AP: expected null or dataset/task/metric"),
        ("solver.early_stop.patience=0", "solver.early_stop.patience=0: expected a whole number of at least 1"),
        ("solver.batch_size=two", "solver.batch_size=two: expected a whole number"),
        ("data=base", "data.root has no value"),
        ("+hook._target_=os.system", "the package 'os' is not trusted"),
    ],
)
def test_a_mistake_is_one_line_and_comes_before_torch(override: str, said: str) -> None:
    if "mask" in override and os.environ.get("MTL_RCNN_TEST_WITHOUT") == "mask":
        pytest.skip("this copy of the project has no task mask")
    status, out, err = run_tool(override)
    assert status == 2
    assert said in err
    assert err.startswith("error: ")
    assert len(err.strip().splitlines()) == 1
    assert "torch imported: False" in out


def test_normalisation_layers_may_share_the_common_weight_decay() -> None:
    assert compose("train", ["data.root=x", "solver.weight_decay_norm=null"]).solver.weight_decay_norm is None
    with pytest.raises(ConfigError, match=r"solver\.weight_decay_norm=-1: expected null or a number of at least 0"):
        compose("train", ["data.root=x", "solver.weight_decay_norm=-1"])


def test_an_error_of_the_tool_itself_is_one_line_too() -> None:
    status, _, err = run_tool("seed=7")
    assert (status, err) == (2, "error: image 3 is broken\n")


def test_hydras_own_features_work(tmp_path: Path) -> None:
    assert "ran 3" in run_tool("seed=3")[1]
    assert "max_iter: 90000" in run_tool("--cfg", "job")[1]
    status, out, err = run_tool("-m", "seed=3,4", f"hydra.sweep.dir={tmp_path}")
    assert status == 0, err
    assert "ran 3" in out
    assert "ran 4" in out
    assert not (ROOT / ".hydra").exists()


def compose_or_skip(overrides: list[str]) -> DictConfig:
    """An experiment may need a task that a copy of the project without it (see test_deleted_task.py) cannot have."""
    try:
        return compose("train", overrides)
    except ConfigError as error:
        if "MTL_RCNN_TEST_WITHOUT" in os.environ and f"no tasks '{os.environ['MTL_RCNN_TEST_WITHOUT']}'" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("path", sorted((ROOT / "configs").rglob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_composes(path: Path) -> None:
    group = path.parent.name
    if group == "configs":
        overrides = ["run=x"] if path.stem in ("analyze_tasks", "evaluate", "export", "report") else []
        overrides += ["network=x", "input=x"] if path.stem == "predict" else []
        overrides += ["network=x", "dataset={name: x}", "output_dir=x"] if path.stem == "pseudo_label" else []
        assert compose(path.stem, overrides)
    elif group == "tasks":
        assert compose("train", [f"tasks=[{path.stem}]"]).tasks[path.stem]._target_
    elif group == "launcher":
        assert compose("train", [f"hydra/launcher={path.stem}", "cluster=slurm"]).cluster.nodes
    elif path.stem == "slurm_pyxis":
        image = ["cluster.container_image=x.sqsh", "cluster.container_mounts=/data:/data"]
        assert "--container-image=x.sqsh" in compose("train", ["cluster=slurm_pyxis", *image]).cluster.srun_args
    elif path.stem != "base":
        assert compose_or_skip([f"{group}={path.stem}"]).solver.max_iter  # iterations, or epochs such as 30ep


def test_an_experiment_that_sets_a_task_the_user_deselects_is_refused(tmp_path: Path) -> None:
    if os.environ.get("MTL_RCNN_TEST_WITHOUT") == "mask":
        pytest.skip("this copy of the project has no task mask")
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text("# @package _global_\ntasks: {mask: {norm: GN}}\n")
    search = f"hydra.searchpath=[file://{tmp_path}]"
    with pytest.raises(
        ConfigError, match=r"experiment/mine\.yaml sets tasks.mask, but the task 'mask' is not selected"
    ):
        compose("train", [search, "experiment=mine", "tasks=[detection]"])


def test_the_difference_against_the_defaults_names_what_was_changed() -> None:
    changes = {entry.key: (entry.default, entry.value) for entry in config_diff(compose("train", ["solver.lr=0.5"]))}
    assert changes.pop("solver.lr") == (0.02, 0.5)
    assert set(changes) <= {"output_dir"}  # holds the time


def test_code_is_resolved_from_trusted_packages_only(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from detectron2.data.transforms import Augmentation

    assert resolve("detectron2.data.transforms.RandomFlip", Augmentation, "k") is RandomFlip
    with pytest.raises(ConfigError, match=r"has no RandomFli; .* did you mean detectron2.data.transforms.RandomFlip"):
        resolve("detectron2.data.transforms.RandomFli", Augmentation, "k")
    with pytest.raises(ConfigError, match="expected a subclass of"):
        resolve("detectron2.structures.Boxes", Augmentation, "k")
    (tmp_path / "strange.py").write_text("raise SystemExit('was run')\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ConfigError, match=r"package 'strange' is not trusted.*--trust strange"):
        resolve("strange.Thing", object, "k")
    monkeypatch.setenv("MTL_RCNN_TRUST", "strange")
    with pytest.raises(SystemExit, match="was run"):
        resolve("strange.Thing", object, "k")


def test_trust_comes_from_the_command_line_and_never_from_yaml(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MTL_RCNN_TRUST", "")
    assert take_trust_flags(["tool", "--trust", "one", "seed=1", "--trust=two"]) == ["tool", "seed=1"]
    assert os.environ["MTL_RCNN_TRUST"] == "one,two"


def test_configurations_are_found_from_anywhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert (config_root() / "train.yaml").is_file()
    assert OmegaConf.is_dict(compose("train"))
