"""What must hold between several settings of the solver."""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn.config.keys import nearest
from mtl_rcnn.errors import ConfigError


def check_solver(cfg: DictConfig) -> None:
    """Refuses settings of the solver that contradict each other, or other parts of the configuration.

    Args:
        cfg: a composed configuration whose single values are in range; one without a solver, or that lacks some of
            its keys, passes.

    Raises:
        ConfigError: names the key.
    """
    solver = cfg.get("solver")
    if isinstance(solver, DictConfig):
        _check_lr_factors(cfg, solver)


def _check_lr_factors(cfg: DictConfig, solver: DictConfig) -> None:
    parts = ["trunk", *(cfg.get("tasks") or {})]
    for name, factor in (solver.get("lr_factors") or {}).items():
        if name not in parts:
            close = nearest(name, parts)
            hint = f"did you mean '{close}'?" if close else f"parts are {', '.join(parts)}"
            raise ConfigError(f"solver.lr_factors: the network has no part '{name}'; {hint}")
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise ConfigError(f"solver.lr_factors.{name}={factor}: expected a number above 0")
