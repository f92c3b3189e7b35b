"""What a run's configuration changes against the defaults."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.compose import compose_unchecked

_ABSENT = "-"


class Difference(NamedTuple):
    """One key, its default and its value; "-" where there is none."""

    key: str
    default: Any
    value: Any


def config_diff(cfg: DictConfig, config_name: str = "train") -> list[Difference]:
    """The keys in which `cfg` differs from the root configuration composed without any override, in order."""
    defaults = dict(_leaves(OmegaConf.to_container(compose_unchecked(config_name), resolve=True)))
    values = dict(_leaves(OmegaConf.to_container(cfg, resolve=True)))
    keys = dict.fromkeys([*values, *defaults])
    found = [Difference(key, defaults.get(key, _ABSENT), values.get(key, _ABSENT)) for key in keys]
    return [entry for entry in found if entry.default != entry.value]


def format_diff(differences: list[Difference]) -> str:
    """One line per key, "key: default -> value"."""
    if not differences:
        return "  (nothing)"
    return "\n".join(f"  {entry.key}: {entry.default} -> {entry.value}" for entry in differences)


def _leaves(node: Any, path: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping) and node:
        for key, value in node.items():
            yield from _leaves(value, f"{path}.{key}" if path else str(key))
    else:
        yield path, node
