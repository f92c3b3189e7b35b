"""Names of what a setting speaks of in the network: the trunk, a task, or parameters by a pattern."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_rcnn.config.keys import nearest
from mtl_rcnn.errors import ConfigError

TRUNK = "trunk"


def is_pattern(name: str) -> bool:
    """Whether a name is one of parameters (`fnmatch`), which only the network can judge: all of these have dots."""
    return any(character in name for character in ".*?[")


def check_part(key: str, name: str, parts: Sequence[str]) -> None:
    """Refuses a name that is neither of a part nor a pattern. Raises ConfigError, naming `key` and what was meant."""
    if name not in parts and not is_pattern(name):
        raise unknown_name(key, name, parts)


def unknown_name(key: str, name: str, known: Sequence[str]) -> ConfigError:
    """The error about a name that stands for nothing.

    Args:
        key: of the configuration.
        known: what there is; parts alone for a name that is not a pattern.
    """
    close = nearest(name, known)
    hint = f"did you mean '{close}'?" if close else f"there are {', '.join(known[:6])}"
    what = "parameter that matches" if is_pattern(name) else "part"
    return ConfigError(f"{key}: the network has no {what} '{name}'; {hint}")
