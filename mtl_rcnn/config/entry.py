"""The entry point of every command line tool: Hydra, with faults found before torch is imported and told in one line.

    @config.main("train")
    def main(cfg: DictConfig) -> None:
        from mtl_rcnn.engine.train import train  # heavy imports come after the checks

        train(cfg)
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from mtl_rcnn.config.compose import COMPOSITION_ERRORS, VERSION_BASE, Composition, config_root
from mtl_rcnn.config.explain import explain
from mtl_rcnn.config.trust import take_trust
from mtl_rcnn.errors import ConfigError, MtlRcnnError

_FULL_ERROR = "HYDRA_FULL_ERROR"
_RANKS = ("RANK", "SLURM_PROCID")
EXIT_STATUS = 2
"""Of a tool that ends with an error which the user can mend."""


def main(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[..., None]]:
    """Makes a function of a configuration a command line tool, as `hydra.main` does, with all of Hydra's features.

    An `MtlRcnnError`, from the configuration or from the function, is printed as `error: ...` and ends the process with
    status 2; other exceptions keep their traceback. `--trust PACKAGE` (repeatable) admits classes of that package as
    `_target_`. Called with a configuration, the tool is the plain function. The environment variable HYDRA_FULL_ERROR=1
    shows the traceback of every error.

    Args:
        config_name: root configuration in `config_root()`.
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[..., None]:
        @functools.wraps(function)
        def tool(cfg: DictConfig | None = None) -> None:
            if cfg is not None:
                function(cfg)
            else:
                _run(function, config_name)

        return tool

    return decorate


def _run(function: Callable[[DictConfig], None], config_name: str) -> None:
    full = os.environ.get(_FULL_ERROR) == "1"
    argv = list(sys.argv)
    try:
        sys.argv[1:] = take_trust(argv[1:])
        composition = _checked_command_line(config_name)
    except MtlRcnnError as error:
        if full:
            raise
        _end(error, only_first_rank=True)
    tool = hydra.main(version_base=VERSION_BASE, config_path=str(config_root()), config_name=config_name)
    try:
        with _errors_passed_on():
            tool(_job(function, argv))()
    except MtlRcnnError as error:
        if full:
            raise
        _end(error)
    except COMPOSITION_ERRORS as error:
        if full or composition is None or not composition.sweep:
            raise
        _end(explain(error, composition))
    finally:
        sys.argv[:] = argv


def _checked_command_line(config_name: str) -> Composition | None:
    """Composes and checks what the command line asks for, before Hydra does; None where it asks for help alone."""
    args = get_args_parser().parse_args()
    if args.help or args.hydra_help or args.shell_completion or args.experimental_rerun:
        return None
    composition = Composition(
        args.config_name or config_name,
        tuple(args.overrides),
        _root(args.config_path),
        args.config_dir,
        sweep=args.multirun or "hydra.mode=MULTIRUN" in args.overrides,
    )
    if args.cfg or args.info or composition.sweep:  # shown even if incomplete; the jobs of a sweep are checked one by one
        composition.load()
    else:
        composition.checked()
    return composition


def _root(config_path: str | None) -> str:
    """Where Hydra's `--config-path` points: a folder relative to the tool's file."""
    if config_path is None:
        return str(config_root())
    if config_path.startswith("pkg://"):
        return config_path
    return os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), config_path)


def _job(function: Callable[[DictConfig], None], argv: Sequence[str]) -> Callable[[DictConfig], None]:
    """What Hydra calls: the tool's function, with the environment and command line that the user gave."""

    @functools.wraps(function)
    def job(cfg: DictConfig) -> None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        with _as_given(argv):
            try:
                if sweep:
                    _composition_of_job().checked()
                function(cfg)
            except MtlRcnnError as error:
                if sweep or os.environ.get(_FULL_ERROR) == "1":
                    raise  # Hydra runs the other jobs, then says which one failed
                _end(error)

    return job


def _composition_of_job() -> Composition:
    """How Hydra composed the running job of a sweep."""
    node = HydraConfig.get()
    sources = {source.provider: source for source in node.runtime.config_sources}
    folder = sources.get("command-line")
    return Composition(
        node.job.config_name,
        (*node.overrides.hydra, *node.overrides.task),
        f"pkg://{sources['main'].path}" if sources["main"]["schema"] == "pkg" else sources["main"].path,
        folder.path if folder else None,
    )


def _end(error: MtlRcnnError, only_first_rank: bool = False) -> None:
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    if rank == "0" or not only_first_rank:  # a fault of the configuration is the same on all ranks
        text = " ".join(str(error).split()) if isinstance(error, ConfigError) else str(error)
        print(f"error: {text}", file=sys.stderr)
    raise SystemExit(EXIT_STATUS)


@contextmanager
def _errors_passed_on() -> Iterator[None]:
    """Inside, Hydra raises errors instead of printing them in its own way and ending the process."""
    before = os.environ.get(_FULL_ERROR)
    os.environ[_FULL_ERROR] = "1"
    try:
        yield
    finally:
        _restore(_FULL_ERROR, before)


def _restore(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


@contextmanager
def _as_given(argv: Sequence[str]) -> Iterator[None]:
    raise NotImplementedError
    yield
