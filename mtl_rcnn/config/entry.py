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
import warnings
from collections.abc import Callable
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from mtl_rcnn.config.checks import check
from mtl_rcnn.config.compose import COMPOSITION_ERRORS, VERSION_BASE, config_root
from mtl_rcnn.config.explain import explain
from mtl_rcnn.config.resolve import take_trust_flags
from mtl_rcnn.errors import MtlRcnnError

EXIT_STATUS = 2
"""Of a tool that ends with an error which the user can mend."""


def main(config_name: str) -> Callable[[Callable[[DictConfig], None]], Callable[[], None]]:
    """Makes a function of a configuration a command line tool, as `hydra.main` does, with all of Hydra's features.

    A key, group or value that cannot be composed, a configuration that `check` refuses, and any `MtlRcnnError` of
    the function itself
    print one line, `error: ...`, and end with status 2; other exceptions keep their traceback. `--trust PACKAGE`
    (repeatable) lets `_target_` name classes of that package.

    Args:
        config_name: root configuration in `config_root()`.
    """

    def decorate(function: Callable[[DictConfig], None]) -> Callable[[], None]:
        @functools.wraps(function)
        def job(cfg: DictConfig) -> None:
            try:
                check(cfg, list(HydraConfig.get().overrides.task))
                function(cfg)
            except MtlRcnnError as error:
                _end(str(error))

        @functools.wraps(function)
        def run() -> None:
            sys.argv = take_trust_flags(sys.argv)
            # Detectron2 scripts some functions when it is imported, of which torch says so each time.
            warnings.filterwarnings("ignore", r"`torch\.jit\.\w+` is deprecated", FutureWarning)
            os.environ.setdefault("HYDRA_FULL_ERROR", "1")  # else Hydra ends the process with a text of its own
            try:
                hydra.main(config_path=str(config_root()), config_name=config_name, version_base=VERSION_BASE)(job)()
            except COMPOSITION_ERRORS as error:
                _end(explain(error, config_name, [word for word in sys.argv[1:] if "=" in word]))

        return run

    return decorate


def _end(text: str) -> NoReturn:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(EXIT_STATUS)
