"""Which code a configuration may name. A YAML file cannot run anything that its user does not trust.

Trusted are this package, Detectron2 where its classes are asked for, and the packages that the command line
(`--trust PACKAGE`) or the environment (`MTL_RCNN_TRUST=package,package`) names. A YAML cannot extend the list.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.errors import ConfigError

TRUST_VARIABLE = "MTL_RCNN_TRUST"
OURS = "mtl_rcnn"
FOUNDATION = "detectron2"
TARGET = "_target_"

_FLAG = "--trust"
_CODE_OF_HYDRA = {  # keys by which Hydra and logging find code, and where that code may stand
    TARGET: ("hydra._internal.core_plugins.", "hydra.experimental.callbacks.", "hydra_plugins."),
    "class": ("logging.", "rich.logging.", "colorlog."),
    "()": ("logging.", "rich.logging.", "colorlog."),
}
_STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
_LOADERS = ("PYTHON", "LD_", "DYLD_", TRUST_VARIABLE)
"""Starts of environment variables by which other code could be loaded."""


def trusted() -> tuple[str, ...]:
    """Packages whose classes a configuration may name, Detectron2 aside."""
    named = [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip()]
    return (OURS, *named)


def check_trusted(path: Any, key: str, also: Sequence[str] = (FOUNDATION,)) -> None:
    """Refuses a dotted path outside the trusted packages. Imports nothing.

    Args:
        path: what `_target_` names.
        key: where it stands in the configuration, for messages.
        also: packages trusted beside `trusted()`.

    Raises:
        ConfigError: not a dotted path, or one whose package is not trusted.
    """
    allowed = (*trusted(), *also)
    if not isinstance(path, str) or path.count(".") < 1 or not all(part.isidentifier() for part in path.split(".")):
        raise ConfigError(f"{key}={path}: expected the dotted path of a class, such as package.module.Class")
    package = path.split(".")[0]
    if package not in allowed:
        raise ConfigError(
            f"{key}={path}: the package '{package}' is not trusted here (trusted: {', '.join(allowed)}); if you wrote "
            f"or read its code, add {_FLAG} {package} to the command line or set {TRUST_VARIABLE}={package}"
        )


def take_trust_flags(arguments: Sequence[str]) -> list[str]:
    """A command line without its `--trust PACKAGE`; the packages go to the environment, where child processes see them.

    Raises:
        ConfigError: a flag without the name of a package.
    """
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, equals, package = word.partition("=")
        if flag != _FLAG:
            kept.append(word)
            continue
        package = package if equals else next(words, "")
        if not package.isidentifier():
            raise ConfigError(f"{_FLAG} '{package}': expected the name of a package, such as {_FLAG} my_tasks")
        os.environ[TRUST_VARIABLE] = ",".join([*filter(None, [os.environ.get(TRUST_VARIABLE)]), package])
    return kept


def check_targets(cfg: DictConfig) -> None:
    """Refuses any `_target_` of a configuration outside the trusted packages. Raises ConfigError."""
    for key, value in _walk(OmegaConf.to_container(cfg, resolve=True)):
        if key.rsplit(".", 1)[-1] == TARGET:
            check_trusted(value, key)


def check_hydra_node(node: DictConfig) -> None:
    """Refuses code that Hydra would run: callbacks, logging classes, loaders' environment variables.

    Raises:
        ConfigError: names the key.
    """
    for variable in OmegaConf.select(node, "job.env_set") or {}:
        if str(variable).upper().startswith(_LOADERS):
            raise ConfigError(f"hydra.job.env_set.{variable}: set it in the environment, not in a configuration")
    for key, value in _walk(OmegaConf.to_container(node, resolve=False), "hydra"):
        allowed = _CODE_OF_HYDRA.get(key.rsplit(".", 1)[-1])
        package = str(value).split(".")[0]
        if allowed and not str(value).startswith(allowed) and package not in trusted():
            raise ConfigError(
                f"{key}={value}: the package '{package}' is not trusted here; if you wrote or read its code, add "
                f"{_FLAG} {package} to the command line"
            )
        if str(value).startswith(("ext://", "cfg://")) and value not in _STREAMS:
            raise ConfigError(f"{key}={value}: expected {' or '.join(_STREAMS)}")


def _walk(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    """All leaves and their dotted keys."""
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _walk(value, f"{path}.{key}" if path else str(key))
    elif isinstance(node, list):
        for index, value in enumerate(node):
            yield from _walk(value, f"{path}.{index}")
    else:
        yield path, node
