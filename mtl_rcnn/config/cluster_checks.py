"""Checks of `cluster` and of the jobs that Hydra's submitit launcher hands in, before they wait in a queue."""

from __future__ import annotations

import importlib.util
import re
import shutil
from collections.abc import Iterator, Sequence
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_rcnn.errors import ConfigError

_LAUNCHER = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
_GROUP = "hydra/launcher=submitit_slurm"
_COUNTS = ("nodes", "tasks_per_node", "timeout_min")
_COUNTS_OR_NULL = ("gpus_per_node", "cpus_per_task", "mem_gb")
_SRUN_OPTIONS = re.compile(r"--(container-[a-z-]+|(cpu|gpu|mem)-bind|mpi|network|kill-on-bad-exit)(=.*)?")
"""Options that name no program: a configuration runs no code but an image's that its user asked for."""
_SHELL = ("setup", "teardown")


def check_cluster(cfg: DictConfig) -> None:
    """Refuses a cluster that there is not, what SLURM could not be asked for, and keys without a value. Raises
    ConfigError."""
    node = cfg.get("cluster")
    if node is None:
        return
    for name in node:
        if OmegaConf.is_missing(node, name):
            raise ConfigError(f"cluster.{name} has no value: add cluster.{name}=VALUE")
    if node.kind not in ("local", "slurm"):
        raise ConfigError(
            f"cluster.kind={node.kind}: expected local or slurm; choose with cluster=local or cluster=slurm"
        )
    for name in ("timeout_s", "heartbeat_s"):
        if name not in node:
            raise ConfigError(f"cluster.{name} is not there: give it as configs/cluster/local.yaml does")
        value = node[name]
        if not (value is None and name == "heartbeat_s") and not (_is_number(value) and value > 0):
            null = "null or " if name == "heartbeat_s" else ""
            raise ConfigError(f"cluster.{name}={value}: expected {null}a number of seconds above 0")
    for name in (*_COUNTS_OR_NULL, *_COUNTS):
        value = node.get(name, 1)
        if value is None and name in _COUNTS_OR_NULL:
            continue
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            null = "null or " if name in _COUNTS_OR_NULL else ""
            hint = "; give it where gpus_per_node is null" if name == "tasks_per_node" and value is None else ""
            raise ConfigError(f"cluster.{name}={value}: expected {null}a whole number of at least 1{hint}")
    for option in node.get("srun_args", []):
        if not _SRUN_OPTIONS.fullmatch(str(option)):
            raise ConfigError(
                f"cluster.srun_args: {option!r} is not among the options that a configuration may give srun "
                "(--container-..., --cpu-bind=, --gpu-bind=, --mem-bind=, --mpi=, --network=, --kill-on-bad-exit=); "
                "for others, write an sbatch script (docs/cluster.md)"
            )


def check_submission(whole: DictConfig, overrides: Sequence[str]) -> None:
    """Refuses a sweep that the submitit launcher would hand to SLURM in vain, or with code of a configuration file.

    Args:
        whole: composed configuration with Hydra's node, without what is swept over.
        overrides: the command line's.

    Raises:
        ConfigError: names the key or what is not installed.
    """
    if whole.hydra.launcher.get("_target_") != _LAUNCHER:
        return
    if OmegaConf.select(whole, "cluster.kind") != "slurm":
        raise ConfigError(f"{_GROUP}: cluster.* says what to ask SLURM for; add cluster=slurm")
    for override in overrides:
        if override.lstrip("+").startswith("cluster") and _is_swept(override):
            raise ConfigError(
                f"{override}: the jobs of a sweep are handed in together and ask for the same; sweep by hand"
            )
    check_cluster(whole)
    try:
        launcher = OmegaConf.to_container(whole.hydra.launcher, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    for name in _SHELL:
        if launcher.get(name):
            raise ConfigError(
                f"hydra.launcher.{name}: a configuration runs no commands; jobs get the environment in which you hand "
                "them in, or write an sbatch script (docs/cluster.md)"
            )
    for key, text in _texts(launcher, "hydra.launcher"):
        if not text.isprintable():  # a second line of the job's script
            raise ConfigError(f"{key}={text!r}: expected text of one line")
    if importlib.util.find_spec("hydra_plugins.hydra_submitit_launcher") is None:
        raise ConfigError(f"{_GROUP}: hydra-submitit-launcher is not installed; pip install 'mtl-rcnn[cluster]'")
    if shutil.which("sbatch") is None:
        raise ConfigError(f"{_GROUP}: there is no sbatch here; hand jobs in where SLURM is installed")


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_swept(override: str) -> bool:
    return OverridesParser.create().parse_override(override).is_sweep_override()


def _texts(node: Any, path: str) -> Iterator[tuple[str, str]]:
    """All keys and values that are text, with where they stand."""
    if isinstance(node, dict):
        for key, value in node.items():
            yield from _texts(key, f"{path} (a key)")
            yield from _texts(value, f"{path}.{key}")
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _texts(value, f"{path}.{index}")
    elif isinstance(node, str):
        yield path, node
