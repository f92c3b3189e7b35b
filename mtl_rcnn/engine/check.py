"""The whole data of a run, read before the run: every fault, what is labelled, what the classes and sizes are, and a
few training steps. `python -m mtl_rcnn.check` prints it; `configs/check.yaml` says what can be chosen."""

from __future__ import annotations

import logging
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from omegaconf import DictConfig

from mtl_rcnn.data.catalog import Dataset, build_datasets
from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.coverage import LabelRow, check_useful, label_table
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.faults import Fault
from mtl_rcnn.data.inspection import image_faults, label_faults, locate, missing_image, repair, write_coco
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.reader import read_dataset
from mtl_rcnn.data.target import Target
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.check_report import as_text, write_json
from mtl_rcnn.engine.data import dataset_specs
from mtl_rcnn.engine.dry_run import DryRun, dry_run
from mtl_rcnn.engine.train import resolved
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.progress import Progress
from mtl_rcnn.visualize.histograms import draw_classes, draw_labels, draw_sizes

_ROUNDS = 4
"""Of repairs: one may bring another fault to light."""


@dataclass
class Source:
    """One dataset under the check.

    Attributes:
        spec: as configured.
        splits: "train", "val" or "train, val".
        name: of its files in the report's folder.
        data: content of its files, repaired as far as the check has come.
        dataset: its records; None where they could not be made.
        faults: all that were found.
        broken: whether its files could not be read at all.
    """

    spec: DatasetSpec
    splits: str
    name: str
    data: CocoData | None = None
    dataset: Dataset | None = None
    faults: list[Fault] = field(default_factory=list)
    broken: bool = False

    def read(self) -> None:
        """Reads the annotation files; what is at fault is left out and noted."""
        self.data = read_dataset(self.spec, self.faults.append)
        self.broken = any(fault.repair is None for fault in self.faults)

    def mend(self, faults: Sequence[Fault]) -> None:
        """Notes faults and makes their repairs."""
        self.faults += locate(faults, self.data.files)
        repair(self.data, faults)


@dataclass
class CheckReport:
    """What the check found.

    Attributes:
        sources: the datasets with their faults.
        general: faults that no dataset alone has, such as classes that contradict each other.
        coverage: which dataset labels which task, after repairs.
        written: files in the report's folder, and repaired annotation files.
        probe: what the dry run told; None without one.
    """

    sources: list[Source]
    general: list[str] = field(default_factory=list)
    coverage: list[LabelRow] = field(default_factory=list)
    written: list[Path] = field(default_factory=list)
    probe: DryRun | None = None

    @property
    def readable(self) -> list[Source]:
        """The datasets whose files could be read."""
        return [source for source in self.sources if not source.broken]

    @property
    def clean(self) -> bool:
        """Whether nothing at all was found."""
        faults = any(source.faults for source in self.sources) or bool(self.general)
        return not faults and not (self.probe and self.probe.faults)


def check(cfg: DictConfig) -> CheckReport:
    """Checks the data of a training configuration, prints the report and writes it to `report_dir`.

    Raises:
        ConfigError: a configuration that does not fit its data.
    """
    cfg = resolved(cfg)
    folder = Path(cfg.report_dir)
    report = CheckReport(_sources(cfg))
    with _plain_progress():
        targets, label_space = _inspect(cfg, report)
    if targets is not None:
        datasets = [source.dataset for source in report.readable]
        report.coverage = label_table(datasets, targets)
        report.general += _useless(report)
        report.written += [path for source in report.readable for path in _draw(source, targets, label_space, folder)]
    if cfg.fix_dir is not None:
        report.written += list(_write_repaired(report.readable, Path(cfg.fix_dir)))
    if targets is not None and (cfg.dry_run is True or (cfg.dry_run == "auto" and report.clean)):
        training = [source.dataset for source in report.sources if "train" in source.splits]
        images = min(cfg.dry_run_images, sum(len(dataset.records) for dataset in training))
        report.probe = dry_run(cfg, training, targets, label_space, images, cfg.dry_run_steps, folder)
    report.written.append(write_json(folder / "faults.json", report))
    print(as_text(report))
    return report


def _sources(cfg: DictConfig) -> list[Source]:
    """Each dataset once, also where it is configured for training and for evaluation."""
    train, val = dataset_specs(cfg, "train"), dataset_specs(cfg, "val")
    splits = [(spec, "train, val" if spec in val else "train") for spec in train]
    splits += [(spec, "val") for spec in val if spec not in train]
    names = Counter(spec.name for spec, _ in splits)
    return [
        Source(spec, split, f"{split}_{spec.name}" if names[spec.name] > 1 else spec.name) for spec, split in splits
    ]


def _inspect(cfg: DictConfig, report: CheckReport) -> tuple[dict[str, Target] | None, LabelSpace | None]:
    """Reads everything, notes every fault and repairs it in memory; None where the data cannot be used at all."""
    for source in report.sources:
        source.read()
    if any(source.broken for source in report.sources if "train" in source.splits):
        return None, None
    label_space = _build(cfg, report)
    if label_space is None:
        return None, None
    targets = build_targets(cfg, label_space)
    for source in report.readable:
        source.mend([*_images(source, cfg.data.workers), *label_faults(source.dataset.records, targets)])
    for _ in range(_ROUNDS):
        label_space = _build(cfg, report)
        if label_space is None:
            return None, None
        found = [list(label_faults(source.dataset.records, targets)) for source in report.readable]
        if not any(found):
            return targets, label_space
        for source, faults in zip(report.readable, found):
            source.mend(faults)
    report.general.append(f"faults are left after {_ROUNDS} rounds of repairs; mend the files and check again")
    return None, None


def _build(cfg: DictConfig, report: CheckReport) -> LabelSpace | None:
    """Records of all sources as training would make them; None, and a general fault, where it would refuse to."""
    training = [source for source in report.sources if "train" in source.splits]
    others = [source for source in report.readable if source.splits == "val"]
    try:
        label_space = _build_records(cfg, training, None, cfg.data.min_instances)
        if others:
            _build_records(cfg, others, label_space, 0)
    except DataError as error:
        report.general.append(str(error))
        return None
    return label_space


def _useless(report: CheckReport) -> list[str]:
    """What training would say of a data set that labels none of its tasks."""
    try:
        check_useful(report.coverage, [source.dataset for source in report.sources if "train" in source.splits])
    except ConfigError as error:
        return [str(error)]
    return []


def _build_records(
    cfg: DictConfig, sources: Sequence[Source], label_space: LabelSpace | None, min_instances: int
) -> LabelSpace:
    datasets, label_space = build_datasets(
        [source.spec for source in sources],
        dict(cfg.data.aliases),
        label_space,
        min_instances,
        on_error="skip",
        contents=[source.data for source in sources],
    )
    for source, dataset in zip(sources, datasets):
        source.dataset = dataset
    return label_space


def _images(source: Source, workers: int) -> Iterator[Fault]:
    yield from map(missing_image, source.dataset.report.missing)
    records = source.dataset.records
    with Progress(f"reading the images of {source.spec.name} ({source.splits})", len(records)) as progress:
        yield from image_faults(records, workers, progress.advance)


def _draw(source: Source, targets: Mapping[str, Target], label_space: LabelSpace, folder: Path) -> list[Path]:
    """Histograms of a dataset's classes and of its objects' sizes, where it has classes, and of what its labels say."""
    title = f"{source.spec.name} ({source.splits})"
    paths = _draw_objects(source, label_space, folder, title) if source.dataset.records[0]["classes"] else []
    for name, target in targets.items():
        said = [counts for record in source.dataset.records if (counts := target.label_counts(record))]
        totals: Counter[str] = Counter()
        for counts in said:
            totals.update(counts)  # keeps what occurs 0 times
        if totals:
            path = folder / f"{source.name}_{name}_labels.png"
            paths.append(draw_labels(path, totals, len(said), f"{name} of {title}"))
    return paths


def _draw_objects(source: Source, label_space: LabelSpace, folder: Path, title: str) -> list[Path]:
    objects = [entry for record in source.dataset.records for entry in record["annotations"] if not entry["iscrowd"]]
    own = {label_space.classes[index] for record in source.dataset.records for index in record["classes"]}
    counts: Mapping[str, int] = Counter(label_space.classes[entry["category_id"]] for entry in objects)
    sides = [(entry["bbox"][2] * entry["bbox"][3]) ** 0.5 for entry in objects if "bbox" in entry]
    return [
        draw_classes(folder / f"{source.name}_classes.png", {name: counts.get(name, 0) for name in sorted(own)}, title),
        draw_sizes(folder / f"{source.name}_sizes.png", sides, title),
    ]


def _write_repaired(sources: Sequence[Source], folder: Path) -> Iterator[Path]:
    """A repaired annotation file per dataset that has faults, all its files merged."""
    for source in sources:
        if source.faults:
            path = folder / f"{source.name}.json"
            write_coco(path, source.data)
            yield path


@contextmanager
def _plain_progress() -> Iterator[None]:
    """Shows the progress lines of a process without a terminal, and nothing else of the log."""
    logger = logging.getLogger(Progress.__module__)
    handler, level = logging.StreamHandler(sys.stdout), logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
