"""Experiment trackers, both optional: W&B and MLflow. They take what TensorBoard takes, from rank 0.

A package that is not installed costs one warning line and nothing else; so does a tracker that fails while the run
goes on. A resumed run goes on with the same tracked run, whose id stands in `trackers.json` of its directory.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine.progress import Writer
from mtl_rcnn.evaluation.results import write_json

logger = logging.getLogger(__name__)

IDS = "trackers.json"


def build_trackers(cfg: DictConfig, folder: Path) -> list[Writer]:
    """Writers for `trackers.names`; one that cannot be had is left out with a warning."""
    found: list[Writer] = []
    for name in cfg.trackers.names:
        try:
            module = importlib.import_module(name)
        except ImportError:
            logger.warning("%s is not installed: the run is not tracked there (pip install 'mtl-rcnn[%s]')", name, name)
            continue
        try:
            found.append(_Guarded(name, _TRACKERS[name](module, cfg, folder)))
        except Exception as error:  # a tracker can fail in any way: no network, no account, a version of its own
            logger.warning("%s cannot be started, the run goes on without it: %s", name, _line(error))
    return found


class WandbWriter:
    """A W&B run named after the run's folder, its files in the folder."""

    def __init__(self, wandb: Any, cfg: DictConfig, folder: Path) -> None:
        self._wandb = wandb
        self._run = wandb.init(
            project=cfg.trackers.project,
            name=folder.resolve().name,
            dir=str(folder),
            config=OmegaConf.to_container(cfg, resolve=True),
            mode="offline" if cfg.trackers.offline else "online",
            id=_known_id(folder, "wandb"),
            resume="allow",
        )
        _keep_id(folder, "wandb", self._run.id)

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        self._run.log(_finite(scalars, timings), step=iteration)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        pictures = [self._wandb.Image(image, caption=title) for title, image in images.items()]
        self._run.log({"predictions": pictures}, step=iteration)

    def close(self) -> None:
        self._run.finish()


class MlflowWriter:
    """An MLflow run named after the run's folder; by default in its `mlruns.db` (SQLite) and `mlruns`: no server."""

    def __init__(self, mlflow: Any, cfg: DictConfig, folder: Path) -> None:
        mlflow.set_tracking_uri(cfg.trackers.mlflow_uri or f"sqlite:///{(folder / 'mlruns.db').resolve()}")
        if cfg.trackers.mlflow_uri is None and mlflow.get_experiment_by_name(cfg.trackers.project) is None:
            # Pictures would else go to the working directory.
            mlflow.create_experiment(cfg.trackers.project, artifact_location=(folder / "mlruns").resolve().as_uri())
        mlflow.set_experiment(cfg.trackers.project)
        run = mlflow.start_run(run_id=_known_id(folder, "mlflow"), run_name=folder.resolve().name)
        self._mlflow, first = mlflow, _known_id(folder, "mlflow") is None
        _keep_id(folder, "mlflow", run.info.run_id)
        if first:
            mlflow.log_dict(OmegaConf.to_container(cfg, resolve=True), "config.yaml")

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        self._mlflow.log_metrics(_finite(scalars, timings), step=iteration)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        for number, image in enumerate(images.values()):
            self._mlflow.log_image(image, f"predictions/{iteration:07d}_{number}.png")

    def close(self) -> None:
        self._mlflow.end_run()


_TRACKERS: dict[str, Callable[[Any, DictConfig, Path], Any]] = {"wandb": WandbWriter, "mlflow": MlflowWriter}


class _Guarded:
    """A tracker whose first fault ends the tracking, not the training."""

    def __init__(self, name: str, tracker: Any) -> None:
        self._name, self._tracker = name, tracker

    def write(self, iteration: int, scalars: Mapping[str, float], timings: Mapping[str, float]) -> None:
        self._call("write", iteration, scalars, timings)

    def write_images(self, iteration: int, images: Mapping[str, np.ndarray]) -> None:
        self._call("write_images", iteration, images)

    def close(self) -> None:
        self._call("close")

    def _call(self, method: str, *arguments: Any) -> None:
        if self._tracker is None:
            return
        try:
            getattr(self._tracker, method)(*arguments)
        except Exception as error:  # see build_trackers
            self._tracker = None
            logger.warning("%s failed, the run goes on without it: %s", self._name, _line(error))


def _finite(scalars: Mapping[str, float], timings: Mapping[str, float]) -> dict[str, float]:
    """Both kinds under the names that `metrics.jsonl` gives them, without what is not finite."""
    values = {**scalars, **{f"time/{name}": value for name, value in timings.items()}}
    return {_name(name): float(value) for name, value in values.items() if math.isfinite(value)}


def _name(name: str) -> str:
    """MLflow admits letters, digits and `_-. /`, and so do we everywhere."""
    return "".join(letter if letter.isalnum() or letter in "_-. /" else "_" for letter in name)


def _known_id(folder: Path, tracker: str) -> str | None:
    path = folder / IDS
    return json.loads(path.read_text(encoding="utf-8")).get(tracker) if path.is_file() else None


def _keep_id(folder: Path, tracker: str, run_id: str) -> None:
    path = folder / IDS
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    write_json(path, {**known, tracker: run_id})


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
