"""A network as two functions, from a checkpoint or from an exported file: prepare an image, run a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Prediction, Sample
from mtl_rcnn.data.views import Views
from mtl_rcnn.engine.build import task_classes
from mtl_rcnn.engine.data import build_prepare, build_views
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.slots import DetectorTask, RegionTask
from mtl_rcnn.modeling.views import MultiViewNetwork
from mtl_rcnn.runtime import ExportedNetwork

EXPORTED = "model.ts"
_Prepare = Callable[[np.ndarray], Sample]
_Run = Callable[[Sequence[Sample]], list[Prediction]]
_NO_TTA = {"scales": None, "max_size": 4000, "flip": False}


@dataclass(frozen=True)
class Network:
    """A network on some device.

    Attributes:
        prepare: (H, W, 3) uint8 RGB -> sample. Threads may call it.
        run: samples -> a prediction each, on the CPU.
        cfg, label_space: of the network.
        tasks: that were chosen, in slot order.
        row_outputs: names of the outputs with one row per detection.
    """

    prepare: _Prepare
    run: _Run
    cfg: DictConfig
    label_space: LabelSpace
    tasks: tuple[str, ...]
    row_outputs: frozenset[str]


def load_network(
    source: str | Path | Restored,
    device: str = "auto",
    tasks: Sequence[str] | None = None,
    tta: Mapping[str, Any] | None = None,
) -> Network:
    """The network of a checkpoint, a run's directory, or an exported `model.ts` or `model.safetensors`.

    Args:
        source: a checkpoint file or its `model.safetensors`; a run's directory, of which the last checkpoint is taken;
            a `model.ts`, or a folder that holds one and no checkpoint; or what `engine.restore` gave.
        device: "auto", "cpu", "cuda" or "cuda:1"; a restored network stays where it is.
        tasks: names of the tasks that are wanted, None for all; a detector stays where a chosen task needs it.
        tta: test-time augmentation, any of `scales`, `max_size` and `flip` as in `configs/predict.yaml`; needs a
            checkpoint.

    Raises:
        MtlRcnnError: there is no network, or it lacks a task.
    """
    if isinstance(source, Restored):
        return checkpoint_network(source, tasks, tta)
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    path = Path(source)
    if path.is_dir() and (path / EXPORTED).is_file() and not list(path.glob("*.pth")):
        path = path / EXPORTED
    if path.suffix != ".ts":
        return checkpoint_network(restore(path, chosen), tasks, tta)
    if tta and any(tta.get(key) for key in ("scales", "flip")):
        raise ConfigError(f"{path}: an exported network has no test-time augmentation; give the checkpoint")
    return exported_network(path, chosen, tasks)


def checkpoint_network(
    restored: Restored, tasks: Sequence[str] | None = None, tta: Mapping[str, Any] | None = None
) -> Network:
    """A restored network, without the heads of tasks that are not chosen; images are prepared as in evaluation."""
    cfg, model = restored.cfg, restored.model
    names = _chosen(cfg, tasks)
    kept = {*names, *_detectors(cfg, names)}
    network = InferenceNetwork(model, kept).eval()
    views = build_views(cfg, _tta(tta or {}))
    prepare, run = _one_view(cfg, network) if views is None else _many_views(views, network)
    shapes = {output.name: output.shape for task in model.tasks() for output in task.outputs() if task.name in kept}
    return Network(prepare, run, cfg, restored.label_space, names, _rows(shapes))


def _one_view(cfg: DictConfig, network: InferenceNetwork) -> tuple[_Prepare, _Run]:
    @torch.no_grad()
    def run(samples: Sequence[Sample]) -> list[Prediction]:
        sizes = [torch.tensor([sample["height"], sample["width"]]) for sample in samples]
        return [_on_cpu(prediction) for prediction in network([sample["image"] for sample in samples], sizes)]

    return build_prepare(cfg), run


def _many_views(views: Views, network: InferenceNetwork) -> tuple[_Prepare, _Run]:
    merging = MultiViewNetwork(network)
    return views.sample, lambda samples: [_on_cpu(prediction) for prediction in merging(samples)]


def _tta(given: Mapping[str, Any]) -> DictConfig:
    for key in given:
        if key not in _NO_TTA:
            raise ConfigError(f"tta.{key}: unknown key; known: {', '.join(_NO_TTA)}")
    return OmegaConf.create({**_NO_TTA, **given})


def exported_network(path: Path, device: str, tasks: Sequence[str] | None = None) -> Network:
    """An exported network. It computes all its tasks; the outputs of those that are not chosen are dropped."""
    if not path.is_file() or not path.with_name("manifest.json").is_file():
        raise ConfigError(f"network={path}: expected an exported model.ts with manifest.json beside it")
    network = ExportedNetwork(path, device)
    cfg = OmegaConf.create(network.manifest["config"])
    for name in set(cfg.tasks) - set(network.manifest.get("tasks", cfg.tasks)):
        del cfg.tasks[name]  # trained, but not exported
    names = _chosen(cfg, tasks)
    kept = {*names, *_detectors(cfg, names)}
    shapes = {entry["name"]: entry["shape"] for entry in network.manifest["outputs"] if entry["task"] in kept}

    def prepare(image: np.ndarray) -> Sample:
        return {"image": torch.tensor(image.transpose(2, 0, 1))}

    def run(samples: Sequence[Sample]) -> list[Prediction]:
        found = network.batch([sample["image"] for sample in samples])
        return [_on_cpu({name: prediction[name] for name in shapes}) for prediction in found]

    return Network(prepare, run, cfg, LabelSpace.from_state(network.manifest["label_space"]), names, _rows(shapes))


def _chosen(cfg: DictConfig, tasks: Sequence[str] | None) -> tuple[str, ...]:
    """Names in slot order."""
    known = list(task_classes(cfg))
    if tasks is None:
        return tuple(known)
    for name in tasks:
        if name not in known:
            raise ConfigError(
                f"tasks={list(tasks)}: the network has no task '{name}'; its tasks are {', '.join(known)}"
            )
    if not tasks:
        raise ConfigError(
            f"no task is chosen; choose at least one of the network's tasks {', '.join(known)}, or null for all"
        )
    return tuple(name for name in known if name in tasks)


def _detectors(cfg: DictConfig, names: Sequence[str]) -> list[str]:
    """The detector's name if one of the tasks needs it, as a list."""
    classes = task_classes(cfg)
    if not any(issubclass(classes[name], RegionTask) for name in names):
        return []
    return [name for name, cls in classes.items() if issubclass(cls, DetectorTask)]


def _rows(shapes: Mapping[str, str]) -> frozenset[str]:
    return frozenset(name for name, shape in shapes.items() if shape.startswith("(N"))


def _on_cpu(prediction: Prediction) -> Prediction:
    return {name: value.cpu() for name, value in prediction.items()}
