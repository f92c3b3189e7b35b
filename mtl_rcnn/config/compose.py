"""From the name of a root configuration and overrides to the composed, checked configuration.

    cfg = compose("train", ["experiment=shapes", "solver.max_iter=100"])

Command line tools compose through `mtl_rcnn.config.main`; both find the same faults and give the same errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl_rcnn.config.checks import check
from mtl_rcnn.errors import ConfigError

VERSION_BASE = "1.3"
"""Whose defaults Hydra takes: this one never changes the working directory."""

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError)
"""What composing a faulty configuration raises; `explain` turns them into one line."""


def compose(config_name: str = "train", overrides: Sequence[str] = ()) -> DictConfig:
    """The configuration that a command line of `overrides` gives a tool. May be called while a Hydra application runs.

    Args:
        config_name: root configuration, such as "train".
        overrides: in Hydra's grammar, such as "tasks=[detection,mask]" or "solver.lr=0.01".

    Raises:
        ConfigError: anything that `mtl_rcnn.config.main` would refuse.
    """
    from mtl_rcnn.config.explain import explain  # it composes again to find the keys that exist

    try:
        cfg = compose_unchecked(config_name, overrides)
    except COMPOSITION_ERRORS as error:
        raise ConfigError(explain(error, config_name, overrides)) from error
    check(cfg, overrides)
    return cfg


def compose_unchecked(config_name: str, overrides: Sequence[str] = ()) -> DictConfig:
    """As `compose`, with Hydra's own errors and no checks."""
    state = GlobalHydra.instance()
    running, state.hydra = state.hydra, None
    try:
        with warnings.catch_warnings(), hydra.initialize_config_dir(str(config_root()), version_base=VERSION_BASE):
            return hydra.compose(config_name, overrides=list(overrides))
    finally:
        state.hydra = running


def config_root() -> Path:
    """Folder of the configurations: installed inside the package, or `configs/` of the clone it is imported from."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"
