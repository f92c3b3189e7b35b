"""From the name of a root configuration and overrides to the composed, checked configuration.

    cfg = compose("train", ["experiment=shapes", "solver.max_iter=100"])

Command line tools compose through `mtl_rcnn.config.main`; both find the same faults and give the same errors.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra import version
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import create_config_search_path
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime, setup_globals
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from mtl_rcnn.config.checks import check
from mtl_rcnn.config.origins import Origins
from mtl_rcnn.config.trust import check_hydra_node
from mtl_rcnn.errors import ConfigError

VERSION_BASE = "1.3"
"""Whose defaults Hydra takes: this one never changes the working directory."""

COMPOSITION_ERRORS = (HydraException, OmegaConfBaseException, YAMLError, UserWarning)
"""What composing a faulty configuration raises; `explain` turns them into one `ConfigError`."""


def config_root() -> Path:
    """Folder of the configurations: installed beside the package's code, or `configs/` of the clone it is imported from."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def compose(config_name: str = "train", overrides: Sequence[str] = (), root: Path | None = None) -> DictConfig:
    """The configuration that a command line of `overrides` gives a tool, checked.

    Args:
        config_name: root configuration, such as "train".
        overrides: in Hydra's grammar, such as "tasks=[detection,mask]" or "solver.lr=0.01".
        root: folder of the configurations; default `config_root()`.

    Raises:
        ConfigError: anything that `mtl_rcnn.config.main` would refuse.
    """
    return Composition(config_name, tuple(overrides), str(root or config_root())).checked()


@dataclass(frozen=True)
class Composition:
    """What Hydra needs to compose one configuration.

    Attributes:
        config_name: root configuration.
        overrides: the command line's.
        root: folder, or `pkg://` package, of the configurations.
        config_dir: the folder of Hydra's `--config-dir`, searched before `root`.
        sweep: whether overrides may hold several values to sweep over.
    """

    config_name: str | None
    overrides: tuple[str, ...]
    root: str
    config_dir: str | None = None
    sweep: bool = False

    def checked(self) -> DictConfig:
        """The tool's part of the configuration after all checks. Raises ConfigError."""
        whole = self.load()
        cfg = job_part(whole)
        check(cfg, Origins(whole, self.loader(), self.config_name, self.overrides))
        return cfg

    def load(self) -> DictConfig:
        """The composed configuration with Hydra's own node, which is checked. Raises ConfigError."""
        try:
            whole = self.compose()
        except COMPOSITION_ERRORS as error:
            from mtl_rcnn.config.explain import explain  # it composes again to find the keys that exist

            raise explain(error, self) from error
        check_hydra_node(whole.hydra)
        return whole

    def compose(self) -> DictConfig:
        """As `load`, unchecked and with Hydra's own errors."""
        mode = RunMode.MULTIRUN if self.sweep else RunMode.RUN
        with warnings.catch_warnings():
            # Hydra goes on without a folder of hydra.searchpath that does not exist.
            warnings.filterwarnings("error", message="provider=.* is not", category=UserWarning)
            return self.loader().load_configuration(self.config_name, list(self.overrides), mode)

    def without_overrides(self, overrides: Sequence[str] = ()) -> Composition:
        """The same root with other overrides."""
        return replace(self, overrides=tuple(overrides))

    def loader(self) -> ConfigLoaderImpl:
        """Hydra's loader; it needs none of Hydra's global state but the resolvers and a name, set here if absent."""
        if version.getbase() is None:
            version.setbase(VERSION_BASE)
        setup_globals()
        if JobRuntime not in Singleton._instances or "name" not in JobRuntime.instance().conf:
            JobRuntime.instance().set("name", self.config_name or "job")
        path = create_config_search_path(self.root)
        if self.config_dir is not None:
            path.prepend("command-line", f"file://{self._folder()}", anchor=SearchPathQuery(provider="schema"))
        return ConfigLoaderImpl(path)

    def _folder(self) -> Path:
        folder = Path(self.config_dir or "").absolute()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {self.config_dir}: no such folder")
        return folder


def job_part(whole: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's own node."""
    cfg: Any = whole.copy()
    OmegaConf.set_readonly(cfg, False)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
