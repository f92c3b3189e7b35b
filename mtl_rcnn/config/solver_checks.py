"""What must hold between several settings of the solver."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.durations import is_epochs
from mtl_rcnn.config.part_names import TRUNK, check_part
from mtl_rcnn.config.task_plans import check_task_schedule
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
        _check_parts(cfg, solver)
        _check_accumulate(cfg, solver)
        _check_steps(solver)
        _check_early_stop(cfg, solver)
        check_task_schedule(cfg)
        if solver.get("val_losses") and not OmegaConf.select(cfg, "data.val"):
            raise ConfigError("solver.val_losses=true: there is no evaluation set; give one with data.val")


def _check_parts(cfg: DictConfig, solver: DictConfig) -> None:
    parts = [TRUNK, *(cfg.get("tasks") or {})]
    for name in solver.get("freeze") or ():
        check_part("solver.freeze", name, parts)
    for name, factor in (solver.get("lr_factors") or {}).items():
        if isinstance(factor, DictConfig):  # Hydra takes the dots of +solver.lr_factors.backbone.fpn_output2=... apart
            raise ConfigError(
                f"solver.lr_factors.{name}={factor}: expected a number above 0; a name with dots stands in braces, "
                "such as '+solver.lr_factors={backbone.fpn_*: 0.5}'"
            )
        check_part("solver.lr_factors", name, parts)
        if isinstance(factor, bool) or not isinstance(factor, int | float) or not 0 < factor < float("inf"):
            raise ConfigError(f"solver.lr_factors.{name}={factor}: expected a number above 0")


def _check_accumulate(cfg: DictConfig, solver: DictConfig) -> None:
    number = solver.get("accumulate", 1)
    if number == 1:
        return
    if "batch_size" in solver and solver.batch_size % number:
        raise ConfigError(
            f"solver.accumulate={number}: solver.batch_size={solver.batch_size} images cannot be cut into {number} "
            "micro-batches of equal size"
        )
    if OmegaConf.select(cfg, "model.sampling", default="keyed") != "keyed":
        raise ConfigError(
            f"solver.accumulate={number}: needs model.sampling=keyed, whose draws repeat, not {cfg.model.sampling}"
        )


def _check_steps(solver: DictConfig) -> None:
    for step in solver.get("steps") or ():
        if isinstance(step, str) and not is_epochs(step):
            raise ConfigError(
                f"solver.steps: {step!r} is neither an iteration (1, 2, ...), nor epochs such as 8ep, nor a fraction "
                "of max_iter in (0, 1)"
            )


def _check_early_stop(cfg: DictConfig, solver: DictConfig) -> None:
    metric = OmegaConf.select(solver, "early_stop.metric")
    if metric is None:
        return
    if solver.get("eval_period") == 0:
        raise ConfigError(
            f"solver.early_stop.metric={metric}: needs evaluations on the way; set solver.eval_period > 0"
        )
    if not OmegaConf.select(cfg, "data.val"):
        raise ConfigError(f"solver.early_stop.metric={metric}: there is no evaluation set; give one with data.val")
