"""Composed configurations as plain dictionaries and as files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from yaml import YAMLError

from mtl_rcnn.errors import ConfigError


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Dictionaries, lists and scalars, with all interpolations resolved."""
    plain: Any = OmegaConf.to_container(cfg, resolve=True, throw_on_missing=True)
    return plain


def save(cfg: DictConfig, path: Path | str) -> None:
    """Writes a configuration, resolved, as YAML."""
    OmegaConf.save(OmegaConf.create(to_plain(cfg)), path)


def load(path: Path | str) -> DictConfig:
    """Reads what `save` wrote.

    Raises:
        ConfigError: no such file, or one that is not a YAML mapping; names the file.
    """
    try:
        cfg = OmegaConf.load(path)
    except (OSError, UnicodeDecodeError, YAMLError) as error:
        raise ConfigError(f"{path}: cannot read the configuration ({' '.join(str(error).split())})") from error
    if not isinstance(cfg, DictConfig):
        raise ConfigError(f"{path}: expected a YAML mapping, the config.yaml of a run")
    return cfg
