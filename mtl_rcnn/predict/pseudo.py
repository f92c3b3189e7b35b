"""Hard distillation: a trained network's predictions become the labels that a data set lacks, in files of its own.

Labels that exist are never touched: an image that is labelled for a task, an instance that has its label, a field that
is filled stay as they are. What is added says so: annotations and image entries get
`pseudo: {task: {checkpoint, iteration, threshold}}`.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.coverage import label_table
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.label_space import LabelSpace, class_name
from mtl_rcnn.data.mapper import read_image
from mtl_rcnn.data.reader import read_dataset
from mtl_rcnn.data.target import InstanceTarget, Record, Sample, Target
from mtl_rcnn.engine.build import build_targets, task_classes
from mtl_rcnn.engine.data import build_prepare
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.errors import ConfigError, UnreadableImageError
from mtl_rcnn.evaluation.progress import Progress
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.labelling import Labeller
from mtl_rcnn.modeling.slots import DetectorTask, RegionTask
from mtl_rcnn.predict.ahead import in_threads
from mtl_rcnn.predict.label_files import ENTRY, LabelFiles
from mtl_rcnn.predict.missing import Job, add_categories, drop_images, objects_of


def pseudo_label(cfg: DictConfig) -> Path:
    """Labels a data set (`configs/pseudo_label.yaml`); returns the output directory, which is complete or absent.

    Raises:
        MtlRcnnError: a network or data set that cannot be read; a task that the network does not have or that cannot
            write labels; an image that cannot be read (`on_error`); an output directory that exists.
    """
    setup_logging(None, Ranks(0, 1, 0, torch.device("cpu")))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if cfg.device == "auto" else cfg.device
    spec = DatasetSpec.from_config(OmegaConf.to_container(cfg.dataset, resolve=True), where="dataset")
    with LabelFiles(Path(cfg.output_dir), Path(spec.images)) as files:
        restored = restore(cfg.network, device, cfg.checkpoint)
        job = _job(cfg, spec, restored)
        names = {*job.targets, *_detectors(restored.cfg, job.targets)}
        left_out = _label(cfg, restored, job, Labeller(InferenceNetwork(restored.model, names).eval()), files)
        drop_images(job.data, left_out)
        files.write(job.data, _entry(spec, job))
    _say(cfg, job, left_out)
    return Path(cfg.output_dir)


def _job(cfg: DictConfig, spec: DatasetSpec, restored: Restored) -> Job:
    space, run = restored.label_space, restored.cfg
    targets = _chosen(cfg, build_targets(run, space))
    thresholds = _thresholds(cfg, targets)
    aliases = dict(run.data.aliases)
    data = read_dataset(spec)
    # A data set that has words of its own keeps to them; one that has none gets the network's.
    data.vocabularies = {**_with_ids(space), **data.vocabularies}
    (dataset,), _ = build_datasets([spec], aliases, space, on_error=cfg.on_error, contents=[data])
    label_table([dataset], targets)
    drop_images(data, data.images.keys() - {record["image_id"] for record in dataset.records})
    detector = next((name for name in _detectors(run, targets) if name in targets), None)
    origin = {"checkpoint": str(restored.path), "iteration": restored.iteration}
    job = Job(dataset, data, targets, detector, thresholds, origin)
    if any(map(job.lacks_objects, dataset.records)):
        job.category_ids = _category_ids(spec, job, space, aliases)
    return job


def _chosen(cfg: DictConfig, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The tasks to label, in slot order; by default all that can write labels."""
    refusals = {name: why for name, target in targets.items() if (why := target.cannot_label()) is not None}
    able = [name for name in targets if name not in refusals]
    wanted = able if cfg.only_tasks is None else list(cfg.only_tasks)
    for name in wanted:
        if name not in targets:
            raise ConfigError(f"only_tasks={wanted}: the network has no task '{name}'; it has {', '.join(targets)}")
        if name in refusals:
            raise ConfigError(
                f"only_tasks={wanted}: the task '{name}' {refusals[name]}; tasks of this network that can be labelled: "
                f"{', '.join(able) or 'none'}"
            )
    if not wanted:
        reasons = "" if able else "".join(f"; the task '{name}' {why}" for name, why in refusals.items())
        raise ConfigError(
            f"only_tasks={wanted}: nothing to label; the network can label {', '.join(able) or 'nothing'}{reasons}"
        )
    return {name: target for name, target in targets.items() if name in wanted}


def _thresholds(cfg: DictConfig, targets: Mapping[str, Target]) -> dict[str, float]:
    for name, value in cfg.thresholds.items():
        if name not in targets:
            raise ConfigError(f"thresholds.{name}={value}: the tasks that are labelled are {', '.join(targets)}")
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
            raise ConfigError(f"thresholds.{name}={value}: expected a number from 0 to 1")
    return {name: float(cfg.thresholds.get(name, cfg.threshold)) for name in targets}


def _with_ids(space: LabelSpace) -> dict[str, tuple[dict[str, Any], ...]]:
    return {
        name: tuple({**entry, "id": index} for index, entry in enumerate(entries))
        for name, entries in space.vocabularies.items()
    }


def _detectors(run: DictConfig, names: Mapping[str, Any]) -> list[str]:
    """The detector's name if one of the tasks needs it, as a list."""
    classes = task_classes(run)
    if not any(issubclass(classes[name], RegionTask) for name in names):
        return []
    return [name for name, cls in classes.items() if issubclass(cls, DetectorTask)]


def _category_ids(spec: DatasetSpec, job: Job, space: LabelSpace, aliases: Mapping[str, str]) -> dict[int, int]:
    """Class index -> category id, of the classes whose objects are added: all, or those the data set is told to use."""
    record = job.dataset.records[0]
    if spec.classes is not None:
        return dict(zip(record["classes"], record["category_ids"]))
    own = {class_name(category, aliases): category["id"] for category in job.data.categories}
    used = {space.classes[index]: number for index, number in zip(record["classes"], record["category_ids"])}
    return add_categories(job.data, space, {**own, **used})


def _label(
    cfg: DictConfig, restored: Restored, job: Job, labeller: Labeller, files: LabelFiles
) -> dict[int | str, str]:
    """Labels every image that can be read, a few read ahead; returns the others with the reason."""
    prepare, left_out = build_prepare(restored.cfg), {}
    records = job.dataset.records

    def read(record: Record) -> Sample | UnreadableImageError:
        try:
            return prepare(read_image(record))
        except UnreadableImageError as error:
            return error

    with Progress(f"labelling {job.dataset.name}", len(records)) as progress:
        for record, sample in zip(records, in_threads(read, records, cfg.workers, cfg.workers)):
            if isinstance(sample, UnreadableImageError):
                if cfg.on_error == "raise":
                    raise sample
                left_out[record["image_id"]] = str(sample)
            else:
                objects, boxes = (None, None) if job.lacks_objects(record) else objects_of(record)
                prediction = labeller(sample["image"], (record["height"], record["width"]), boxes)
                job.add(record, prediction, objects, files)
            progress.advance(1)
    return left_out


def _entry(spec: DatasetSpec, job: Job) -> dict[str, Any]:
    """The labelled data set's entry in a configuration, as far as it differs from a plain one."""
    entry: dict[str, Any] = {"name": spec.name}
    if spec.tasks is not None:
        added = [name for name, tally in job.tallies.items() if tally.added and name not in spec.tasks]
        entry["tasks"] = [*spec.tasks, *added]
    if spec.classes is not None:
        entry["classes"] = list(spec.classes)
    return entry


def _say(cfg: DictConfig, job: Job, left_out: Mapping[int | str, str]) -> None:
    rows = [(name, tally.added, tally.there, tally.unsure) for name, tally in job.tallies.items()]
    print(tabulate(rows, headers=("task", "labels added", "were there", "not sure enough")))
    gaps = [
        name
        for name, tally in job.tallies.items()
        if tally.unsure and not isinstance(job.targets[name], InstanceTarget)
    ]
    if gaps and cfg.dataset.get("tasks") is not None:
        print(
            f"some images are without a label of {', '.join(gaps)}: a data set whose `tasks` name them must have them "
            "all; lower the threshold, or choose images with `image_ids`"
        )
    for image_id, reason in left_out.items():
        print(f"left out image {image_id}: {reason}")
    print(f"{len(job.data.images)} images; an entry for data.train is in {Path(cfg.output_dir) / ENTRY}")
