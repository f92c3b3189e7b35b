"""Which networks a comparison trains, each with its configuration."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.compose import Composition, defaults_of
from mtl_rcnn.engine.build import task_classes
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.slots import DetectorTask, ImageTask

PLAIN = "sum"
"""The method of all networks that are not there for their method."""

_BY_TASK = (
    *("balancing.weights", "checkpoint.graft", "checkpoint.reinit"),
    *("solver.freeze", "solver.lr_factors", "solver.task_schedule"),
)
"""Names of tasks, of their losses, or patterns of their parameters; as keys or in lists."""


@dataclass(frozen=True)
class Network:
    """What is trained once per seed.

    Attributes:
        name: of its folders.
        title: for the reader.
        tasks: in slot order.
        cfg: of a training run; its seed and its folder are the comparison's.
        own_of: the task whose own network it is: that task, and the detector where it works on boxes.
        method: of balancing, or name of the variant; None unless it is there for it.
    """

    name: str
    title: str
    tasks: tuple[str, ...]
    cfg: DictConfig
    own_of: str | None = None
    method: str | None = None


@dataclass(frozen=True)
class Cell:
    """One training.

    Attributes:
        network, seed: what is trained.
        folder: its run.
    """

    network: Network
    seed: int
    folder: Path

    @property
    def name(self) -> str:
        """Of its folder."""
        return self.folder.name

    @property
    def cfg(self) -> DictConfig:
        """Its configuration."""
        cfg = self.network.cfg.copy()
        cfg.seed, cfg.output_dir = self.seed, str(self.folder)
        return cfg


def plan_networks(composition: Composition) -> list[Network]:
    """The networks of a comparison: each task's own, the subsets, then those of all tasks.

    Raises:
        ConfigError: there is nothing to compare, a subset is no network, or a variant's configuration is faulty.
    """
    _check_overrides(composition)
    plain = composition.with_overrides([*composition.overrides, f"balancing={PLAIN}"]).checked()
    classes = task_classes(plain)
    everything = tuple(classes)
    detector = tuple(name for name, cls in classes.items() if issubclass(cls, DetectorTask))
    networks: dict[tuple[str, ...], Network] = {}
    for task, cls in classes.items():
        tasks = (task,) if issubclass(cls, ImageTask) or task in detector else (*detector, task)
        networks[tasks] = _of_tasks(plain, everything, tasks, own_of=task)
    for subset in plain.subsets:
        tasks = _ordered(subset, everything)
        networks.setdefault(tasks, _of_tasks(plain, everything, tasks))
    joint = list(_of_all(composition, plain, everything, networks.get(everything)))
    if any(network.method == PLAIN for network in joint):
        networks.pop(everything, None)  # it is a task's own network at once
    found = [*networks.values(), *joint]
    if len(found) < 2:
        raise ConfigError(
            f"tasks=[{everything[0]}]: there is nothing to compare; select more tasks, methods or variants"
        )
    return found


def plan_cells(networks: Sequence[Network], seeds: int, folder: Path) -> list[Cell]:
    """All trainings, one seed of all networks after the other: a comparison that is cut short compares all of them."""
    first = networks[0].cfg.seed
    return [
        Cell(network, seed, folder / "runs" / f"{network.name}_seed{seed}")
        for seed in range(first, first + seeds)
        for network in networks
    ]


def without_tasks(cfg: DictConfig, absent: Sequence[str]) -> DictConfig:
    """A copy of a training configuration without some tasks, and without what it says of them: weights, rates,
    schedules, what is frozen, and training sets that declare labels of no other task."""
    cfg = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    cfg.tasks = OmegaConf.masked_copy(cfg.tasks, [name for name in cfg.tasks if name not in absent])
    for key in _BY_TASK:
        node = OmegaConf.select(cfg, key)
        for name in list(node or ()):
            if _speaks_of(name, absent):
                node.pop(name) if isinstance(node, DictConfig) else node.remove(name)
    for key in ("solver.best_metric", "solver.early_stop.metric"):
        metric = OmegaConf.select(cfg, key)
        if metric is not None and metric.split("/")[1:2] and metric.split("/")[1] in absent:
            OmegaConf.update(cfg, key, None)
    return _without_sets(cfg)


def _speaks_of(name: str, tasks: Sequence[str]) -> bool:
    return not set(re.split(r"[./]", name)).isdisjoint(tasks)


def _without_sets(cfg: DictConfig) -> DictConfig:
    """Removes the data sets that declare labels of none of the tasks."""
    kept = [s for s in cfg.data.train if s.get("tasks") is None or set(s.tasks) & set(cfg.tasks)]
    gone = {s.name for s in cfg.data.train} - {s.name for s in kept}
    cfg.data.train = kept
    for name in list(OmegaConf.select(cfg, "data.mixing.ratios") or ()):
        if name in gone:
            del cfg.data.mixing.ratios[name]
    return cfg


def _of_tasks(
    plain: DictConfig, everything: Sequence[str], tasks: tuple[str, ...], own_of: str | None = None
) -> Network:
    cfg = _training(without_tasks(plain, [task for task in everything if task not in tasks]))
    try:
        task_classes(cfg)
    except ConfigError as error:
        raise ConfigError(f"subsets: [{','.join(tasks)}]: {error}") from error
    return Network("-".join(tasks), " + ".join(tasks), tasks, cfg, own_of)


def _of_all(
    composition: Composition, plain: DictConfig, tasks: tuple[str, ...], own: Network | None
) -> Iterator[Network]:
    """The networks of all tasks: by method, then the variants. The first may be a task's own."""
    settings: dict[str, list[str]] = {method: [f"balancing={method}"] for method in plain.methods}
    for name, overrides in plain.variants.items():
        if name in settings:
            raise ConfigError(f"variants.{name}: there is a method of this name; choose another name")
        chosen = [str(override) for override in overrides]
        settings[name] = chosen if _sets(chosen, "balancing") else [f"balancing={PLAIN}", *chosen]
    if not settings:
        raise ConfigError("methods=[]: expected at least one, such as methods=[sum]")
    for name, overrides in settings.items():
        cfg = composition.with_overrides([*composition.overrides, *overrides]).checked()
        if tuple(task_classes(cfg)) != tasks:
            raise ConfigError(f"variants.{name}: a variant cannot change the tasks; subsets=[...] is for that")
        title = " + ".join(tasks) if len(tasks) < 4 else f"all {len(tasks)} tasks"
        yield Network(
            f"all-{name}",
            f"{title}, {name}",
            tasks,
            _training(cfg),
            own.own_of if own is not None and name == PLAIN else None,
            name,
        )


def _ordered(subset: Any, everything: Sequence[str]) -> tuple[str, ...]:
    names = [subset] if isinstance(subset, str) else list(subset)
    for name in names:
        if name not in everything:
            raise ConfigError(f"subsets: no task '{name}' is selected; tasks are {', '.join(everything)}")
    return tuple(task for task in everything if task in names)


def _check_overrides(composition: Composition) -> None:
    if _sets(composition.overrides, "balancing"):
        raise ConfigError("balancing: a comparison says methods=[sum,...], a network of all tasks for each")


def _sets(overrides: Sequence[str], group: str) -> bool:
    return any(override.split("=")[0] == group for override in overrides)


def _training(cfg: DictConfig) -> DictConfig:
    """The part that a training run reads. Metrics that an experiment expects are those of another budget."""
    own = set(cfg) - set(defaults_of("train"))
    copy = OmegaConf.create(OmegaConf.to_container(cfg, resolve=True))
    for key in own:
        del copy[key]
    copy.expected = {}
    return copy
