"""What must hold of a composed configuration before anything heavy is imported."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from mtl_rcnn.config.cluster_checks import check_cluster
from mtl_rcnn.config.durations import is_epochs
from mtl_rcnn.config.feature_checks import check_features
from mtl_rcnn.config.keys import flatten, nearest, unknown_key
from mtl_rcnn.config.mixing_checks import check_mixing
from mtl_rcnn.config.origins import Origins
from mtl_rcnn.config.predict_checks import check_predict
from mtl_rcnn.config.solver_checks import check_solver
from mtl_rcnn.config.trust import TARGET, check_targets
from mtl_rcnn.errors import ConfigError


def check(cfg: DictConfig, origins: Origins | None = None) -> None:
    """Refuses a configuration that cannot be run.

    Args:
        cfg: a composed configuration without Hydra's own node.
        origins: who set what; without it messages cannot name files and overrides, and the files' keys are not checked.

    Raises:
        ConfigError: no task, settings of a task that is not selected, a key of an experiment that does not exist, a
            value that was left open or cannot be interpolated, a `_target_` outside the trusted packages, a number out
            of range. Names the key.
    """
    _check_tasks(cfg, origins)
    if origins is not None:
        _check_files(cfg, origins)
    check_cluster(cfg)
    _check_complete(cfg)
    check_targets(cfg)
    for key, rule in _RULES.items():
        _check_value(cfg, key, rule)
    check_mixing(cfg)
    check_solver(cfg)
    check_features(cfg)
    check_predict(cfg)


def _check_tasks(cfg: DictConfig, origins: Origins | None) -> None:
    tasks = cfg.get("tasks")
    if not tasks:
        if "tasks" in cfg or (origins is not None and origins.selects("tasks")):
            options = f" ({', '.join(origins.options('tasks'))})" if origins else ""
            raise ConfigError(f"tasks=[]: no task is selected; select at least one{options}")
        return
    selected = [name for name, node in tasks.items() if isinstance(node, DictConfig) and TARGET in node]
    for name in tasks:
        if name not in selected:
            raise ConfigError(_stub(name, selected, origins))


def _stub(name: str, selected: list[str], origins: Origins | None) -> str:
    """The message about settings of a task that is not there."""
    key = f"tasks.{name}"
    origin = origins.find(key) if origins else None
    who = f"{origin} sets {key}" if origin and not origin.lstrip("+").startswith(key) else origin or key
    options = origins.options("tasks") if origins else [name]
    drop = (
        f"or drop its settings with ~{key}" if origin is None or origin.endswith(".yaml") else "or drop this override"
    )
    return f"{who}{', but' if ' sets ' in who else ':'} {absent_task(name, selected, options)}, {drop}"


def absent_task(name: str, selected: list[str], options: list[str]) -> str:
    """Why a task cannot have settings, and what to do: it is not selected, or there is none of this name."""
    if name not in options:
        close = nearest(name, options)
        hint = f"did you mean '{close}'?" if close else ""
        return f"there is no task '{name}'; {hint} available: {', '.join(options)}".replace(";  ", "; ")
    now, then = ",".join(selected), ",".join([*selected, name])
    return f"the task '{name}' is not selected (tasks=[{now}]); select it with tasks=[{then}]"


def _check_files(cfg: DictConfig, origins: Origins) -> None:
    for file, key in origins.unknown_keys():
        node = cfg
        for part in key.split("."):  # an override may have deleted it, or put something else in its place
            node = node.get(part) if isinstance(node, DictConfig) and part in node else None
        if node is not None:
            known = [k for k in flatten(OmegaConf.to_container(cfg, resolve=False)) if k != key]
            raise ConfigError(f"{file}: {unknown_key(key, known)}")


def _check_complete(cfg: DictConfig) -> None:
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if not missing:
            OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key}: {str(error).splitlines()[0]}") from error
    if missing:
        example = " ".join(f"{key}=VALUE" for key in missing)
        raise ConfigError(f"{', '.join(missing)} {'has' if len(missing) == 1 else 'have'} no value: add {example}")


def _check_value(cfg: DictConfig, key: str, rule: tuple[str, Callable[[Any], bool]]) -> None:
    parent, _, name = key.rpartition(".")
    node = OmegaConf.select(cfg, parent) if parent else cfg
    if not isinstance(node, DictConfig) or name not in node:
        return
    expected, holds = rule
    if not holds(node[name]):
        raise ConfigError(f"{key}={node[name]}: expected {expected}")


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pair(value: Any) -> bool:
    return isinstance(value, Sequence) and len(value) == 2 and all(_is_number(entry) for entry in value)


def _is_counts(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return listed and len(value) > 0 and all(_is_integer(entry) and entry > 0 for entry in value)


def _is_metric(value: Any) -> bool:
    return isinstance(value, str) and value.count("/") >= 2


def _is_list_of_names(value: Any) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, str) and all(isinstance(name, str) for name in value)


def _one_of(*names: str | bool) -> tuple[str, Callable[[Any], bool]]:
    return " or ".join(str(name).lower() if isinstance(name, bool) else name for name in names), lambda v: v in names


_COUNT = ("a whole number of at least 0", lambda v: _is_integer(v) and v >= 0)
_POSITIVE_COUNT = ("a whole number of at least 1", lambda v: _is_integer(v) and v >= 1)
_LENGTH = (f"{_COUNT[0]}, or epochs such as 12ep", lambda v: is_epochs(v) or _COUNT[1](v))
_POSITIVE_LENGTH = (f"{_POSITIVE_COUNT[0]}, or epochs such as 12ep", lambda v: is_epochs(v) or _POSITIVE_COUNT[1](v))
_POSITIVE = ("a number above 0", lambda v: _is_number(v) and v > 0)
_AT_LEAST_0 = ("a number of at least 0", lambda v: _is_number(v) and v >= 0)
_FRACTION = ("a number from 0 to 1", lambda v: _is_number(v) and 0 <= v <= 1)
_BOOLEAN = ("true or false", lambda v: isinstance(v, bool))
_NAMES = ("null or a list of names", lambda v: v is None or _is_list_of_names(v))
_RULES: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "seed": _COUNT,
    "seeds": _POSITIVE_COUNT,
    "device": _one_of("auto", "cpu", "cuda"),
    "threads": ("null or a whole number of at least 1", lambda v: v is None or (_is_integer(v) and v >= 1)),
    "model.cache_features": ("null, ram, or a folder", lambda v: v is None or (isinstance(v, str) and v != "")),
    "balancing.at": _one_of("features", "parameters"),
    "checkpoint.resume": (
        "auto, false or a checkpoint file; this one holds weights alone, which start a run as checkpoint.weights",
        lambda v: not str(v).endswith(".safetensors"),
    ),
    "checkpoint.keep": _POSITIVE_COUNT,
    "checkpoint.keep_every": (f"null or {_POSITIVE_LENGTH[0]}", lambda v: v is None or _POSITIVE_LENGTH[1](v)),
    "checkpoint.asynchronous": _BOOLEAN,
    "checkpoint.extend": _BOOLEAN,
    "export.method": _one_of("trace", "script", "onnx", "safetensors"),
    "export.tasks": _NAMES,
    "preemption.requeue": _BOOLEAN,
    "preemption.repeat_s": _AT_LEAST_0,
    "evaluation.pictures": _BOOLEAN,
    "evaluation.worst_images": _COUNT,
    "evaluation.classes": _NAMES,
    "evaluation.samples": _COUNT,
    "report.enabled": _BOOLEAN,
    "report.images": _COUNT,
    "trackers.names": (
        "a list of wandb and mlflow",
        lambda v: _is_list_of_names(v) and all(name in ("wandb", "mlflow") for name in v),
    ),
    "trackers.offline": _BOOLEAN,
    "analysis.every": _COUNT,
    "nodes": ("a list of whole numbers of at least 1, such as [1,2,4]", _is_counts),
    "gpus_per_node": _POSITIVE_COUNT,
    "batch_per_node": _BOOLEAN,
    "seconds_per_image": ("null or a number above 0", lambda v: v is None or _POSITIVE[1](v)),
    "steps": _POSITIVE_COUNT,
    "links.within_node": _POSITIVE,
    "links.between_nodes": _POSITIVE,
    "links.latency_us": _AT_LEAST_0,
    "batches": _POSITIVE_COUNT,
    "batch_size": _POSITIVE_COUNT,
    "images_per_batch": ("null or a whole number of at least 1", lambda v: v is None or _POSITIVE_COUNT[1](v)),
    "images": _COUNT,
    "threshold": _FRACTION,
    "pictures": _BOOLEAN,
    "worst_images": _COUNT,
    "classes": _NAMES,
    "data.crowd": _one_of("background", "ignore"),
    "data.on_error": _one_of("raise", "skip"),
    "data.min_instances": _COUNT,
    "data.repeat_thresh": (
        "null or a number above 0 and at most 1",
        lambda v: v is None or (_is_number(v) and 0 < v <= 1),
    ),
    "data.workers": _COUNT,
    "data.window": _POSITIVE_COUNT,
    "solver.batch_size": _POSITIVE_COUNT,
    "solver.accumulate": _POSITIVE_COUNT,
    "solver.max_iter": _POSITIVE_LENGTH,
    "solver.reference_batch_size": (
        "null or a whole number of at least 1",
        lambda v: v is None or _POSITIVE_COUNT[1](v),
    ),
    "solver.lr": _POSITIVE,
    "solver.optimizer": _one_of("sgd", "adamw"),
    "solver.momentum": _FRACTION,
    "solver.betas": ("two numbers of at least 0 and below 1", lambda v: _is_pair(v) and all(0 <= b < 1 for b in v)),
    "solver.eps": _POSITIVE,
    "solver.freeze": ("a list of names", _is_list_of_names),
    "solver.layer_decay": (
        "null or a number above 0 and at most 1",
        lambda v: v is None or (_is_number(v) and 0 < v <= 1),
    ),
    "solver.weight_decay": _AT_LEAST_0,
    "solver.weight_decay_norm": ("null or a number of at least 0", lambda v: v is None or _AT_LEAST_0[1](v)),
    "solver.schedule": _one_of("multistep", "cosine"),
    "solver.gamma": _POSITIVE,
    "solver.warmup_iters": _LENGTH,
    "solver.warmup_factor": _FRACTION,
    "solver.clip_gradients": ("null or a number above 0", lambda v: v is None or (_is_number(v) and v > 0)),
    "solver.ema": ("null or a number of at least 0 and below 1", lambda v: v is None or (_is_number(v) and 0 <= v < 1)),
    "solver.precision": _one_of("float32", "bfloat16", "float16"),
    "solver.eval_period": _LENGTH,
    "solver.checkpoint_period": _LENGTH,
    "solver.log_period": _POSITIVE_LENGTH,
    "solver.val_losses": _BOOLEAN,
    "solver.early_stop.metric": ("null or dataset/task/metric", lambda v: v is None or _is_metric(v)),
    "solver.early_stop.patience": _POSITIVE_COUNT,
    "dry_run": _one_of("auto", True, False),
    "dry_run_images": _POSITIVE_COUNT,
    "dry_run_steps": _POSITIVE_COUNT,
    "tta.scales": ("null or a list of whole numbers of at least 1", lambda v: v is None or _is_counts(v)),
    "tta.max_size": _POSITIVE_COUNT,
    "tta.flip": ("true or false", lambda v: isinstance(v, bool)),
}
"""Key -> what its value must be, in words and as a test. Keys that a configuration lacks are not checked."""
