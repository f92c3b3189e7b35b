"""The entry point of every command line tool: Hydra, with faults found before torch is imported and told in one line.

@config.main("train")
def main(cfg: DictConfig) -> None:
    from mtl_rcnn.engine.train import train  # heavy imports come after the checks

    train(cfg)
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

import hydra
from hydra._internal.utils import get_args_parser
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig

from mtl_rcnn.config.cluster_checks import check_submission
from mtl_rcnn.config.compose import VERSION_BASE, Composition, config_root
from mtl_rcnn.config.explain import explain
from mtl_rcnn.config.trust import take_trust_flags
from mtl_rcnn.errors import ConfigError, MtlRcnnError

_FULL_ERROR = "HYDRA_FULL_ERROR"
_RANKS = ("RANK", "SLURM_PROCID")
_PATIENCE_SECONDS = 3
"""Rank 0 tells what is wrong: torchrun, and srun --kill-on-bad-exit, end all ranks as soon as one has ended."""
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
    argv, full_error = list(sys.argv), os.environ.get(_FULL_ERROR)
    # Detectron2 scripts some functions when it is imported, of which torch says so each time.
    warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
    composition: Composition | None = None
    try:
        # With full errors, Hydra raises what it would print in its own way before ending the process.
        with _process([argv[0], *take_trust_flags(argv[1:])], full_error="1"):
            args = get_args_parser().parse_args()
            composition = _composition(args, config_name)
            _check(composition, args)
            job = _job(function, argv, full_error)
            hydra.main(version_base=VERSION_BASE, config_path=str(config_root()), config_name=config_name)(job)()
    except MtlRcnnError as error:
        _end(error, full_error)
    except HydraException as error:  # of a job of a sweep, which is composed by itself
        if composition is None:
            raise
        _end(explain(error, composition), full_error)


def _composition(args: argparse.Namespace, config_name: str) -> Composition:
    return Composition(
        args.config_name or config_name,
        tuple(args.overrides),
        _root(args.config_path),
        args.config_dir,
        sweep=args.multirun or "hydra.mode=MULTIRUN" in args.overrides,
    )


def _root(config_path: str | None) -> str:
    """Where Hydra's `--config-path` points: a package, or a folder relative to the tool's file."""
    if config_path is None:
        return str(config_root())
    if config_path.startswith("pkg://"):
        return config_path
    return os.path.join(os.path.dirname(os.path.realpath(sys.argv[0])), config_path)


def _check(composition: Composition, args: argparse.Namespace) -> None:
    """Finds the faults of a command line before Hydra does."""
    if args.help or args.hydra_help or args.shell_completion or args.experimental_rerun:
        return
    if (
        args.cfg or args.info or composition.sweep
    ):  # shown even if incomplete; the jobs of a sweep are checked one by one
        whole = composition.load()
        if composition.sweep and not (args.cfg or args.info):
            check_submission(whole, composition.overrides)
    else:
        composition.checked()


def _job(
    function: Callable[[DictConfig], None], argv: Sequence[str], full_error: str | None
) -> Callable[[DictConfig], None]:
    """What Hydra calls: the tool's function, in the process as the user started it."""

    @functools.wraps(function)
    def job(cfg: DictConfig) -> None:
        sweep = HydraConfig.get().mode == RunMode.MULTIRUN
        with _process(argv, full_error):
            try:
                if sweep:
                    Composition.of_running_job().checked()
                    _separate(cfg)
                function(cfg)
            except MtlRcnnError as error:
                if sweep:
                    raise  # Hydra runs the other jobs first and says which one failed
                _end(error, full_error)

    return job


def _separate(cfg: DictConfig) -> None:
    """Gives a job of a sweep its own folder in `output_dir`, in which it would else go on with another job's run."""
    if cfg.get("output_dir") is not None:
        cfg.output_dir = f"{cfg.output_dir}/{HydraConfig.get().job.num}"


def _end(error: MtlRcnnError, full_error: str | None) -> NoReturn:
    if full_error == "1":
        raise error
    rank = next((os.environ[name] for name in _RANKS if name in os.environ), "0")
    if rank == "0" or not isinstance(error, ConfigError):  # a fault of the configuration is the same on all ranks
        text = " ".join(str(error).split()) if isinstance(error, ConfigError) else str(error)
        print(f"error: {text}", file=sys.stderr)
    else:
        time.sleep(_PATIENCE_SECONDS)
    raise SystemExit(EXIT_STATUS)


@contextmanager
def _process(argv: Sequence[str], full_error: str | None) -> Iterator[None]:
    """Gives the process these arguments and this HYDRA_FULL_ERROR inside the block."""
    before = list(sys.argv), os.environ.get(_FULL_ERROR)
    _set_process(argv, full_error)
    try:
        yield
    finally:
        _set_process(*before)


def _set_process(argv: Sequence[str], full_error: str | None) -> None:
    sys.argv[:] = argv
    os.environ.pop(_FULL_ERROR, None)
    if full_error is not None:
        os.environ[_FULL_ERROR] = full_error
