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
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from hydra.core.object_type import ObjectType
from hydra.core.utils import setup_globals
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
    """Folder of the configurations: installed beside the code, or `configs/` of the clone that it is imported from."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def compose(
    config_name: str = "train", overrides: Sequence[str] = (), root: Path | None = None, checked: bool = True
) -> DictConfig:
    """The configuration that a command line of `overrides` gives a tool.

    Args:
        config_name: root configuration, such as "train".
        overrides: in Hydra's grammar, such as "tasks=[detection,mask]" or "solver.lr=0.01".
        root: folder of the configurations; default `config_root()`.
        checked: False admits what composes but cannot be run, such as a value that is still open.

    Raises:
        ConfigError: anything that `mtl_rcnn.config.main` would refuse.
    """
    composition = Composition(config_name, tuple(overrides), str(root or config_root()))
    return composition.checked() if checked else job_part(composition.load())


def defaults_of(config_name: str, root: Path | None = None) -> DictConfig:
    """A root configuration without any override, unchecked: the defaults of its tool."""
    return compose(config_name, (), root, checked=False)


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

    @classmethod
    def of_running_job(cls) -> Composition:
        """How Hydra composed the job that is running."""
        node = HydraConfig.get()
        folders = {source.provider: f"{source.schema}://{source.path}" for source in node.runtime.config_sources}
        config_dir = folders.get("command-line")
        return cls(
            node.job.config_name,
            (*node.overrides.hydra, *node.overrides.task),
            folders["main"],
            config_dir.removeprefix("file://") if config_dir else None,
        )

    def checked(self) -> DictConfig:
        """The tool's part of the configuration after all checks. Raises ConfigError."""
        whole = self.load()
        cfg = job_part(whole)
        check(cfg, Origins(self, whole))
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

    def with_overrides(self, overrides: Sequence[str]) -> Composition:
        """The same root with other overrides."""
        return replace(self, overrides=tuple(overrides))

    def options(self, group: str | None) -> list[str]:
        """Names of a group's files, wherever Hydra searches; for None, of the groups, Hydra's own aside."""
        search = [override for override in self.overrides if override.startswith("hydra.searchpath=")]
        try:
            if group is None:
                return [name for name in self._names("", ObjectType.GROUP, search) if name != "hydra"]
            return [name for name in self._names(group, ObjectType.CONFIG, search) if not name.startswith("_dummy")]
        except COMPOSITION_ERRORS:
            return []

    def _names(self, group: str, kind: ObjectType, overrides: list[str]) -> list[str]:
        return self.loader().get_group_options(group, kind, self.config_name, overrides)

    def loader(self) -> ConfigLoaderImpl:
        """Hydra's loader; of Hydra's global state it needs the resolvers and the version only."""
        if version.getbase() is None:
            version.setbase(VERSION_BASE)
        setup_globals()
        path = create_config_search_path(self.root)
        _drop_launcher_schema()
        if self.config_dir is not None:
            path.prepend("command-line", f"file://{self._folder()}", anchor=SearchPathQuery(provider="schema"))
        return ConfigLoaderImpl(path)

    def _folder(self) -> Path:
        folder = Path(self.config_dir or "").absolute()
        if not folder.is_dir():
            raise ConfigError(f"--config-dir {self.config_dir}: no such folder")
        return folder


def _drop_launcher_schema() -> None:
    """Leaves `hydra/launcher/submitit_slurm` to our file: Hydra would hold it against the plugin's schema of the same
    name, which has no arguments of srun. The search path has loaded the plugin before."""
    ConfigStore.instance().repo["hydra"].get("launcher", {}).pop("submitit_slurm.yaml", None)


def job_part(whole: DictConfig) -> DictConfig:
    """A composed configuration without Hydra's own node."""
    cfg: Any = whole.copy()
    OmegaConf.set_readonly(cfg, False)
    with open_dict(cfg):
        del cfg["hydra"]
    return cfg
