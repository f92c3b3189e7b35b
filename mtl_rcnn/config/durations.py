"""Lengths of a run in epochs: `12ep` is twelve times all training images, repeats included."""

from __future__ import annotations

import math
import re
from fractions import Fraction
from typing import Any

from omegaconf import DictConfig, OmegaConf

__all__ = ["in_iterations", "is_epochs"]

_EPOCHS = re.compile(r"(\d+(?:\.\d+)?)ep")
_KEYS = ("max_iter", "steps", "warmup_iters", "eval_period", "checkpoint_period", "log_period", "task_schedule")


def is_epochs(value: Any) -> bool:
    """Whether a value is a number of epochs above 0, such as "12ep" or "0.5ep"."""
    return _epochs(value) is not None


def in_iterations(cfg: DictConfig, images: float) -> DictConfig:
    """A copy of a training configuration in which every length of the solver, and `checkpoint.keep_every`, is a number
    of iterations.

    Epochs are rounded up: "1ep" is the first iteration after which every image has been seen (none being repeated).

    Args:
        images: training samples of an epoch: all images after filters, or the mean where images are repeated.
    """
    copy: Any = cfg.copy()
    for key in _KEYS:
        if key in copy.solver:
            value = copy.solver[key]
            plain = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
            copy.solver[key] = _iterations(plain, images, copy.solver.batch_size)
    copy.checkpoint.keep_every = _iterations(copy.checkpoint.keep_every, images, copy.solver.batch_size)
    return copy


def _iterations(value: Any, images: float, batch_size: int) -> Any:
    """A value, or every one that lies in it."""
    if isinstance(value, dict):
        return {key: _iterations(entry, images, batch_size) for key, entry in value.items()}
    if isinstance(value, list):
        return [_iterations(entry, images, batch_size) for entry in value]
    epochs = _epochs(value)
    return value if epochs is None else math.ceil(epochs * images / batch_size)


def _epochs(value: Any) -> Fraction | None:
    match = _EPOCHS.fullmatch(value) if isinstance(value, str) else None
    epochs = Fraction(match[1]) if match else Fraction(0)  # exact: 0.1ep of 1000 images are 100
    return epochs if epochs > 0 else None
