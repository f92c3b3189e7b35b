"""From the composed configuration to targets, the network and evaluators. Tasks are named by the configuration
alone."""

from __future__ import annotations

import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from detectron2.modeling.backbone import Backbone
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.resolve import resolve
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record, Target
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.evaluator import Evaluator, class_indices
from mtl_rcnn.modeling.backbone import ResNetFPN
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.roi_heads import MultiTaskROIHeads
from mtl_rcnn.modeling.sampling import LabelSampler
from mtl_rcnn.modeling.slots import DetectorTask, ImageTask, RoiTask, Task

_SECTIONS = ("_target_", "target", "evaluator")
_SLOTS = (DetectorTask, RoiTask, ImageTask)


def task_classes(cfg: DictConfig) -> dict[str, type[Task]]:
    """The selected tasks in slot order (detector, RoI, image), by name within a slot: the order of the YAML does
    not matter."""
    classes = {name: resolve(node["_target_"], Task, f"tasks.{name}._target_") for name, node in cfg.tasks.items()}
    slots = {name: _slot(name, cls) for name, cls in classes.items()}
    if list(slots.values()).count(0) > 1:
        raise ConfigError(f"tasks={list(classes)}: a network has one detector slot, but several tasks fill it")
    if 1 in slots.values() and 0 not in slots.values():
        needy = [name for name, slot in slots.items() if slot == 1]
        raise ConfigError(
            f"tasks={list(classes)}: {', '.join(needy)} work on boxes; add a detector task (such as detection)"
        )
    if not classes:
        raise ConfigError("tasks=[]: select at least one task")
    return {name: classes[name] for name in sorted(classes, key=lambda name: (slots[name], name))}


def build_targets(cfg: DictConfig, label_space: LabelSpace) -> dict[str, Target]:
    """The data side of every selected task, in slot order."""
    return {
        name: cls.target_class(name, label_space, **_plain(cfg.tasks[name].get("target", {})))
        for name, cls in task_classes(cfg).items()
    }


def build_evaluators(cfg: DictConfig, label_space: LabelSpace, records: Sequence[Record]) -> dict[str, Evaluator]:
    """The evaluators of every selected task on one dataset, in slot order. They score the classes of
    `evaluation.classes`; ConfigError if the network lacks one."""
    names = OmegaConf.select(cfg, "evaluation.classes")
    classes = None if names is None else class_indices(label_space, names, "evaluation.classes")
    evaluators = {
        name: cls.evaluator_class(name, label_space, records, **_plain(cfg.tasks[name].get("evaluator", {})))
        for name, cls in task_classes(cfg).items()
    }
    for evaluator in evaluators.values():
        evaluator.classes = classes
    return evaluators


def build_model(cfg: DictConfig, label_space: LabelSpace) -> MultiTaskRCNN:
    """The network with random weights, a pure function of the seed and each part's name.

    Every part draws its initial weights from its own stream, so that adding a task leaves the others' start as it is.
    """
    sampler = LabelSampler(cfg.model.sampling, cfg.seed)
    with _stream(cfg.seed, "backbone"):
        backbone = _build_trunk(cfg)
    features = backbone.output_shape()
    tasks: list[Task] = []
    for name, cls in task_classes(cfg).items():
        knobs = {key: value for key, value in _plain(cfg.tasks[name]).items() if key not in _SECTIONS}
        extra = (sampler,) if issubclass(cls, DetectorTask) else ()
        with _stream(cfg.seed, name):
            tasks.append(cls(name, label_space, features, *extra, **knobs))
    _check_outputs(tasks)
    detector = [task for task in tasks if isinstance(task, DetectorTask)]
    roi_heads = None
    if detector:
        _check_classes(detector[0], label_space)
        roi_heads = MultiTaskROIHeads(
            detector[0],
            [task for task in tasks if isinstance(task, RoiTask)],
            features,
            sampler,
            num_classes=len(label_space.classes),
            **_plain(cfg.model.regions),
        )
    return MultiTaskRCNN(
        backbone,
        roi_heads,
        [task for task in tasks if isinstance(task, ImageTask)],
        cfg.model.pixel_mean,
        cfg.model.pixel_std,
    )


def _build_trunk(cfg: DictConfig) -> Backbone:
    knobs = dict(_plain(cfg.model.backbone))
    # Checkpoints of version 0.1 name no class: there was one.
    cls = resolve(knobs.pop("_target_", f"{ResNetFPN.__module__}.ResNetFPN"), Backbone, "model.backbone._target_")
    return cls(**knobs)


def _slot(name: str, cls: type[Task]) -> int:
    for index, slot in enumerate(_SLOTS):
        if issubclass(cls, slot):
            return index
    raise ConfigError(
        f"tasks.{name}._target_: {cls.__name__} fills no slot; derive it from DetectorTask, RoiTask or ImageTask"
    )


def _check_classes(detector: DetectorTask, label_space: LabelSpace) -> None:
    if not label_space.classes:
        raise ConfigError(
            f"the task '{detector.name}' finds objects of classes, but no training set has any categories; add a "
            "dataset that has, or select tasks on whole images alone"
        )


def _check_outputs(tasks: Sequence[Task]) -> None:
    owner: dict[str, str] = {}
    for task in tasks:
        for output in task.outputs():
            if output.name in owner:
                raise ConfigError(
                    f"tasks {owner[output.name]} and {task.name} both predict '{output.name}': rename one"
                )
            owner[output.name] = task.name


def _plain(node: Any) -> Mapping[str, Any]:
    return OmegaConf.to_container(node, resolve=True) if isinstance(node, DictConfig) else dict(node)


@contextmanager
def _stream(seed: int, name: str) -> Iterator[None]:
    """Torch's generator, seeded by (seed, name) inside the block and restored after it."""
    with torch.random.fork_rng():
        torch.manual_seed((seed * 1_000_003 + zlib.crc32(name.encode())) % 2**63)
        yield
