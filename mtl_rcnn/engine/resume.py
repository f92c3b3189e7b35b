"""Where a run starts: from a checkpoint of its own, from weights, or at random."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.checkpoint import Checkpointer
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.engine.schedule import LrSchedule, load_optimizer
from mtl_rcnn.engine.weights import check_label_space, load_weights
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

__all__ = ["start"]

logger = logging.getLogger(__name__)

_RESUMED = ("best", "balancing", "scaler", "ema", "early_stop", "task_schedule", "evaluation_due", "rows")
"""Parts of a checkpoint that a run goes on with, besides the weights and the optimizer; None at its start."""

_STREAM = ("seed", "solver.batch_size", "data.window", "data.repeat_thresh")
"""Settings that say which samples come when."""


def start(
    cfg: DictConfig,
    checkpointer: Checkpointer,
    model: MultiTaskRCNN,
    optimizer: torch.optim.Optimizer,
    label_space: LabelSpace,
) -> dict[str, Any]:
    """Resumes, loads weights, or starts at random; returns the iteration and the states of `_RESUMED`."""
    resume = cfg.checkpoint.resume
    path = {"auto": checkpointer.resumable, False: checkpointer.latest}.get(resume, lambda: Path(resume))()
    if path is not None and resume is False:
        raise ConfigError(
            f"output_dir={cfg.output_dir} holds a run already ({path.name}): choose another, or checkpoint.resume=auto"
        )
    if path is None:
        if cfg.checkpoint.weights:
            load_initial_weights(cfg, model, label_space)
        elif cfg.solver.freeze:
            logger.warning("solver.freeze: what is frozen stays at its random start; give checkpoint.weights")
        return {"iteration": 0, **dict.fromkeys(_RESUMED)}
    state = checkpoints.load(path)
    check_label_space(state["label_space"], label_space, str(path))
    _check_same_stream(cfg, state["config"], path)
    _take_plan(cfg, state["config"], state["iteration"], path)
    load_weights(model, state["model"], str(path))
    load_optimizer(optimizer, state["optimizer"], str(path))
    logger.info("resuming from %s after iteration %d", path, state["iteration"])
    return {key: state[key] for key in ("iteration", *_RESUMED)}


def _check_same_stream(cfg: DictConfig, saved: Mapping[str, Any], path: Path) -> None:
    """A resumed run goes on with the same samples only if what plans them is unchanged."""
    old = OmegaConf.create(dict(saved))
    settings = [(key, *(OmegaConf.select(c, key) for c in (old, cfg))) for key in _STREAM]
    settings.append(("data.mixing", *(_mixing(c) for c in (old, cfg))))
    settings.append(("repeat of data.train", *([entry.get("repeat", 1) for entry in c.data.train] for c in (old, cfg))))
    for key, before, now in settings:
        if before != now:
            raise ConfigError(
                f"{key}={now}: {path} was trained with {before}; a resumed run must keep it (choose another output_dir "
                f"and checkpoint.weights={path} to start anew from these weights)"
            )


def _take_plan(cfg: DictConfig, saved: Mapping[str, Any], done: int, path: Path) -> None:
    """Prints the schedule of the checkpoint and that of the run, where they differ.

    A new one that had the same learning rates in the iterations that are done makes the resumed run one that had it
    from the start. Any other is taken only with `checkpoint.extend`.
    """
    old, new = (LrSchedule.from_config({**cfg.solver, **node}) for node in (saved["solver"], cfg.solver))
    if old == new:
        return
    if new.max_iter < done:
        raise ConfigError(f"solver.max_iter={new.max_iter}: {path} has done {done} iterations; give at least as many")
    old_text, new_text = (_describe(plan, done) for plan in (old, new))
    if not cfg.checkpoint.extend and any(old.at(iteration) != new.at(iteration) for iteration in range(done)):
        raise ConfigError(
            f"the schedule differs from that of {path} in the {done} iterations that are done, such as in their "
            f"learning rates; go on with the new one by checkpoint.extend=true, or give the old one "
            f"(old: {old_text} | new: {new_text})"
        )
    moved = "the schedule is planned anew, with all lengths that are fractions of solver.max_iter"
    logger.info("%s\n  old: %s\n  new: %s", moved, old_text, new_text)


def _describe(plan: LrSchedule, done: int) -> str:
    steps = f", x {plan.gamma:g} at {', '.join(map(str, plan.steps))}" if plan.steps else ""
    warmup = f", warm-up of {plan.warmup_iters} from x {plan.warmup_factor:g}" if plan.warmup_iters else ""
    after = f"; after iteration {done} the rate is {plan.at(done):g}"
    return f"{plan.max_iter} iterations, {plan.name}, lr {plan.lr:g}{steps}{warmup}{after}"


def _mixing(cfg: DictConfig) -> dict[str, Any] | None:
    """What says which samples come when; None where nothing is mixed, as in runs before there was a mixture."""
    node = cfg.data.get("mixing")
    return None if node is None or node.method is None else OmegaConf.to_container(node, resolve=True)
