"""Which code a configuration may name: classes of known interfaces in trusted packages. A YAML file cannot run
anything else.

Trusted are this package, Detectron2 where a caller asks for its classes, and what the command line (`--trust
PACKAGE`) or the environment (`MTL_RCNN_TRUST=package,package`) names. A YAML cannot extend the list.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Sequence
from typing import TypeVar

from mtl_rcnn.errors import ConfigError

TRUST_VARIABLE = "MTL_RCNN_TRUST"
_ALWAYS = ("mtl_rcnn", "detectron2")

T = TypeVar("T")


def resolve(path: str, base: type[T], key: str) -> type[T]:
    """The class that a `_target_` names.

    Args:
        path: "package.module.Class".
        base: what it must be a subclass of.
        key: where it stands in the configuration, for messages.

    Raises:
        ConfigError: an untrusted package (nothing is imported then), a module or class that does not exist,
            another kind of class.
    """
    check_trusted(path, key)
    module_name, _, name = path.rpartition(".")
    try:
        found = getattr(importlib.import_module(module_name), name)
    except ImportError as error:
        raise ConfigError(f"{key}={path}: cannot import {module_name} ({error})") from error
    except AttributeError:
        raise ConfigError(f"{key}={path}: {module_name} has no {name}") from None
    if not isinstance(found, type) or not issubclass(found, base):
        raise ConfigError(f"{key}={path}: expected a subclass of {base.__module__}.{base.__qualname__}")
    return found


def check_trusted(path: str, key: str) -> None:
    """Raises ConfigError unless the dotted path lies in a trusted package. Imports nothing."""
    package, dot, _ = path.partition(".")
    if not dot or package not in trusted():
        raise ConfigError(
            f"{key}={path}: the package '{package}' is not trusted to be run from a configuration (trusted: "
            f"{', '.join(trusted())}); if you wrote it or read it, add --trust {package} to the command line or set "
            f"{TRUST_VARIABLE}={package}"
        )


def trusted() -> tuple[str, ...]:
    """Packages whose classes a configuration may name."""
    named = [name.strip() for name in os.environ.get(TRUST_VARIABLE, "").split(",") if name.strip()]
    return (*_ALWAYS, *named)


def take_trust_flags(arguments: Sequence[str]) -> list[str]:
    """Removes every `--trust PACKAGE` from a command line and adds the packages to the environment, which child
    processes see."""
    kept: list[str] = []
    words = iter(arguments)
    for word in words:
        flag, _, package = word.partition("=")
        if flag != "--trust":
            kept.append(word)
            continue
        package = package or next(words, "")
        if not package:
            raise SystemExit("error: --trust needs the name of a package")
        before = os.environ.get(TRUST_VARIABLE, "")
        os.environ[TRUST_VARIABLE] = f"{before},{package}" if before else package
    return kept
