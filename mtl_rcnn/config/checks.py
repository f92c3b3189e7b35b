"""What must hold of a composed configuration before anything heavy is imported."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.resolve import check_trusted
from mtl_rcnn.errors import ConfigError

_POSITIVE = ("solver.batch_size", "solver.max_iter", "solver.log_period", "checkpoint.keep", "data.window")
_COUNTS = ("solver.eval_period", "solver.checkpoint_period", "data.workers", "data.min_instances", "seed")


def check(cfg: DictConfig, overrides: Sequence[str] = ()) -> None:
    """Refuses a configuration that cannot be run.

    Raises:
        ConfigError: a task that has settings but is not selected, a value that was left open, a `_target_` outside
            the trusted packages, a number out of range; names the key.
    """
    for name, node in cfg.get("tasks", {}).items():
        if not isinstance(node, DictConfig) or "_target_" not in node:
            raise ConfigError(_stub(name, overrides))
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ConfigError(f"{missing[0]} has no value: set it, as in {missing[0]}=VALUE")
    for key, target in _targets(OmegaConf.to_container(cfg, resolve=False), ""):
        check_trusted(target, key)
    for keys, least in ((_POSITIVE, 1), (_COUNTS, 0)):
        for key in keys:
            _check_integer(cfg, key, least)


def _stub(name: str, overrides: Sequence[str]) -> str:
    mine = [entry for entry in overrides if entry.lstrip("+").startswith(f"tasks.{name}")]
    source = mine[0] if mine else next((entry for entry in overrides if entry.startswith("experiment=")), "a YAML file")
    return (
        f"{source} sets tasks.{name}, but the task '{name}' is not selected: select it (tasks=[..., {name}]) or "
        f"remove the setting "
        f"(~tasks.{name})"
    )


def _targets(node: Any, path: str) -> Iterator[tuple[str, str]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            here = f"{path}.{key}" if path else str(key)
            if key == "_target_":
                yield here, str(value)
            else:
                yield from _targets(value, here)
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _targets(value, f"{path}[{index}]")


def _check_integer(cfg: DictConfig, key: str, least: int) -> None:
    value = OmegaConf.select(cfg, key)
    if OmegaConf.select(cfg, key.split(".")[0]) is None or value is None:
        return
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ConfigError(f"{key}={value}: expected a whole number of at least {least}")
