"""Who set a key: the override or the configuration file, so that a message can name it.

Files of groups define what keys there are; files under `# @package _global_`, such as experiments, only change values.
Hydra checks the command line's keys against the files, but not the keys of one file against those of the others:
`unknown_keys` does.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.trust import OURS, TARGET

if TYPE_CHECKING:
    from mtl_rcnn.config.compose import Composition

_NOT_KEYS = ("defaults", "hydra")


@dataclass(frozen=True)
class ConfigFile:
    """One file of a composition.

    Attributes:
        name: path in the configuration folder, such as "experiment/shapes".
        content: what it sets, at the place in the whole configuration where it is put.
        defines: whether its keys are definitions; those of other files must exist already.
    """

    name: str
    content: Mapping[str, Any]
    defines: bool


class Origins:
    """The files and overrides of one composition.

    Args:
        composition: what was composed.
        whole: the result, with Hydra's node.
    """

    def __init__(self, composition: Composition, whole: DictConfig) -> None:
        self.composition = composition
        self.sources = whole.hydra.runtime.config_sources

    def find(self, key: str) -> str | None:
        """The override, else the last file, that sets `key` or something below it."""
        for override in reversed(self.composition.overrides):
            name = override_key(override)
            if name == key or name.startswith(f"{key}."):
                return override
        names = [f"{file.name}.yaml" for file in self.files if _has(file.content, key)]
        return names[-1] if names else None

    def unknown_keys(self) -> Iterator[tuple[str, str]]:
        """(file, key) of every key that a file sets although no defining file has it."""
        known: dict[str, Any] = {}
        for file in self.files:
            if file.defines:
                _merge(known, file.content)
        for file in self.files:
            if not file.defines:
                yield from ((f"{file.name}.yaml", key) for key in _unknown(file.content, known, ""))

    def options(self, group: str) -> list[str]:
        """Names of the files of a group."""
        return self.composition.options(group)

    def selects(self, group: str) -> bool:
        """Whether the root configuration chooses from a group."""
        return any(file.name.startswith(f"{group}/") for file in Origins._bare(self).files)

    def _bare(self) -> Origins:
        bare = object.__new__(Origins)
        bare.composition, bare.sources = self.composition.with_overrides(()), self.sources
        return bare

    @cached_property
    def files(self) -> list[ConfigFile]:
        """The files in the order in which they are merged, Hydra's own aside."""
        path = ConfigSearchPathImpl()
        for source in self.sources:
            path.append(source.provider, f"{source.schema}://{source.path}")
        repository = ConfigRepository(path)
        composition = self.composition
        defaults = composition.loader().compute_defaults_list(
            composition.config_name, list(composition.overrides), RunMode.RUN
        )
        files = []
        for default in defaults.defaults:
            name = default.config_path
            if name is None or name.startswith("hydra/"):
                continue
            content = OmegaConf.to_container(repository.load_config(name).config, resolve=False)
            package = "" if default.package in (None, "_global_") else default.package
            files.append(ConfigFile(name, _placed(content, package), defines=bool(package) or "/" not in name))
        return files


def override_key(override: str) -> str:
    """The key, or group, that an override names."""
    return override.split("=", 1)[0].lstrip("+~")


def _placed(content: Any, package: str) -> dict[str, Any]:
    content = {key: value for key, value in content.items() if key not in _NOT_KEYS}
    for part in reversed(package.split(".") if package else []):
        content = {part: content}
    return content


def _merge(into: dict[str, Any], node: Mapping[str, Any]) -> None:
    for key, value in node.items():
        if isinstance(value, Mapping):
            here = into.get(key)
            into[key] = here if isinstance(here, dict) else {}
            _merge(into[key], value)
        else:
            into[key] = value


def _unknown(node: Mapping[str, Any], known: Mapping[str, Any], path: str) -> Iterator[str]:
    for key, value in node.items():
        here = f"{path}{key}"
        if key not in known:
            if not (
                isinstance(value, Mapping) and TARGET in value
            ):  # a new member of a collection, such as an augmentation
                yield here
        elif isinstance(value, Mapping) and isinstance(known[key], Mapping) and _closed(value, known[key]):
            yield from _unknown(value, known[key], f"{here}.")


def _closed(node: Mapping[str, Any], known: Mapping[str, Any]) -> bool:
    """Whether all keys are listed: not those of an empty mapping, of another class, or of a class that is not ours."""
    target = known.get(TARGET)
    return bool(known) and (target is None or (target.startswith(f"{OURS}.") and node.get(TARGET, target) == target))


def _has(content: Any, key: str) -> bool:
    for part in key.split("."):
        if not isinstance(content, Mapping) or part not in content:
            return False
        content = content[part]
    return True
