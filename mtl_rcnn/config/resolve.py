"""From the `_target_` of a configuration to the class it names."""

from __future__ import annotations

import difflib
import importlib
from types import ModuleType
from typing import TypeVar

from mtl_rcnn.config.trust import FOUNDATION, check_trusted
from mtl_rcnn.errors import ConfigError

T = TypeVar("T")


def resolve(path: str, base: type[T], key: str) -> type[T]:
    """The class that a `_target_` names. Detectron2's classes are trusted only where `base` is one of them.

    Args:
        path: "package.module.Class".
        base: what it must be, or be a subclass of.
        key: where it stands in the configuration, for messages.

    Raises:
        ConfigError: an untrusted package (nothing is imported then), a module or class that does not exist, another
            kind of class.
    """
    check_trusted(path, key, also=(FOUNDATION,) if base.__module__.split(".")[0] == FOUNDATION else ())
    module_name, _, name = path.rpartition(".")
    module = _import(module_name, f"{key}={path}")
    found = getattr(module, name, None)
    if not isinstance(found, type) or not issubclass(found, base):
        close = difflib.get_close_matches(name, _subclasses(module, base), n=1)
        hint = f"; did you mean {module_name}.{close[0]}?" if close else ""
        fault = "" if hasattr(module, name) else f"{module_name} has no {name}; "
        raise ConfigError(f"{key}={path}: {fault}expected a subclass of {base.__module__}.{base.__qualname__}{hint}")
    return found


def _import(name: str, where: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ConfigError(f"{where}: cannot import {name} ({error}); is it installed or on PYTHONPATH?") from error


def _subclasses(module: ModuleType, base: type) -> list[str]:
    return [name for name, value in vars(module).items() if isinstance(value, type) and issubclass(value, base)]
