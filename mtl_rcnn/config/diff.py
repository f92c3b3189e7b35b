"""What a run's configuration changes against the defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.compose import defaults_of
from mtl_rcnn.config.trust import TARGET

_LONGEST = 100  # characters of a printed value


class _Absent:
    """In place of a value where there is none."""

    def __repr__(self) -> str:
        return "absent"


ABSENT: Any = _Absent()


class Difference(NamedTuple):
    """A key, its default and its value; `ABSENT` where there is none.

    What only one side has is one difference, however much it holds.
    """

    key: str
    default: Any
    value: Any


def config_diff(cfg: DictConfig, defaults: DictConfig | None = None) -> list[Difference]:
    """Where `cfg` differs from its defaults, in the order of `cfg`, what it lacks last.

    A value that differs only because it refers to another key that does is not listed.

    Args:
        cfg: a composed configuration.
        defaults: what to compare with; default: the root configuration "train" without any override or experiment.
    """
    defaults = defaults_of("train") if defaults is None else defaults
    both = [(_plain(node, False), _plain(node, True)) for node in (defaults, cfg)]
    return list(_differences(both[0], both[1], ""))


def format_diff(differences: list[Difference]) -> str:
    """One line per difference: "key: default -> value"."""
    return "\n".join(f"  {_line(difference)}" for difference in differences) or "  nothing"


def _differences(old: tuple[Any, Any], new: tuple[Any, Any], key: str) -> Iterator[Difference]:
    """Compares two nodes, each given as (with its interpolations, resolved)."""
    if old[0] == new[0] or old[1] == new[1]:
        return
    if not all(isinstance(node, Mapping) for node in (*old, *new)):
        yield Difference(key, old[1], new[1])
        return
    for name in dict.fromkeys([*new[1], *old[1]]):
        here = f"{key}.{name}" if key else str(name)
        yield from _differences(_child(old, name), _child(new, name), here)


def _child(node: tuple[Any, Any], name: str) -> tuple[Any, Any]:
    return (node[0].get(name, ABSENT), node[1].get(name, ABSENT))


def _line(difference: Difference) -> str:
    if difference.default is ABSENT:
        return f"{difference.key}: added {_short(difference.value)}"
    if difference.value is ABSENT:
        return f"{difference.key}: removed"
    return f"{difference.key}: {_short(difference.default)} -> {_short(difference.value)}"


def _short(value: Any) -> str:
    text = str(value[TARGET]) if isinstance(value, Mapping) and TARGET in value else str(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def _plain(cfg: DictConfig, resolve: bool) -> Any:
    return OmegaConf.to_container(cfg, resolve=resolve)
