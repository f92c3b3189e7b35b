"""Which dataset labels which task, and how much: the first thing to look at before a training run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mtl_rcnn.data.catalog import Dataset
from mtl_rcnn.data.target import Target
from mtl_rcnn.errors import ConfigError, DataError


@dataclass(frozen=True)
class LabelRow:
    """One cell line of the label table: a dataset and a task.

    Attributes:
        images_labelled, images: images labelled for the task (also those labelled as showing nothing), of all.
        instances_labelled, instances: instances that carry a label of the task, of all that are no crowd.
    """

    dataset: str
    task: str
    images_labelled: int
    images: int
    instances_labelled: int
    instances: int


def label_table(datasets: Sequence[Dataset], targets: Mapping[str, Target]) -> list[LabelRow]:
    """Checks every label of every record, and counts: one row per dataset and task.

    Raises:
        DataError: the first faulty label, and how many more records have one.
    """
    return [row for dataset in datasets for row in _rows(dataset, targets)]


def check_useful(table: Sequence[LabelRow], datasets: Sequence[Dataset]) -> None:
    """Refuses training sets that train nothing.

    Args:
        table: of `label_table`, of these data sets and the selected tasks.
        datasets: the training sets.

    Raises:
        ConfigError: a data set that labels none of the tasks.
    """
    tasks = ", ".join(dict.fromkeys(row.task for row in table))
    for dataset in datasets:
        if any(row.images_labelled for row in table if row.dataset == dataset.name):
            continue
        own = dataset.records[0]["tasks"]
        declared = "no tasks, and its files carry labels of none" if own is None else f"tasks: [{', '.join(own)}]"
        raise ConfigError(
            f"dataset {dataset.name!r} trains nothing: it labels no image for any of the selected tasks ({tasks}); it "
            f"declares {declared}; remove it from data.train, select a task that it labels, or correct its `tasks`"
        )


def _rows(dataset: Dataset, targets: Mapping[str, Target]) -> list[LabelRow]:
    """In one pass over the records, which are unpickled at each access."""
    instances = 0
    images_labelled, instances_labelled = Counter[str](), Counter[str]()
    faults: dict[str, list[DataError]] = {name: [] for name in targets}
    for record in dataset.records:
        instances += sum(not entry["iscrowd"] for entry in record["annotations"])
        for name, target in targets.items():
            try:
                covered = target.check(record)
            except DataError as fault:
                faults[name].append(fault)
                continue
            images_labelled[name] += covered.image
            instances_labelled[name] += covered.instances
    for found in faults.values():
        _refuse(found, dataset.name)
    images = len(dataset.records)
    return [
        LabelRow(dataset.name, name, images_labelled[name], images, instances_labelled[name], instances)
        for name in targets
    ]


def _refuse(faults: Sequence[DataError], dataset: str) -> None:
    if len(faults) == 1:
        raise faults[0]
    if faults:
        raise DataError(f"{faults[0]} ({len(faults) - 1} more images of dataset {dataset!r} have faulty labels)")
