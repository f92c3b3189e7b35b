"""From dataset specifications to records of one label space."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.dataset_spec import DatasetSpec, suggest
from mtl_rcnn.data.label_space import Category, LabelSpace, class_name, merge_categories, merge_vocabularies
from mtl_rcnn.data.reader import read_dataset
from mtl_rcnn.data.record_store import RecordStore
from mtl_rcnn.data.records import ClassMap, EntryMaps, Report, make_records, some
from mtl_rcnn.data.target import Record
from mtl_rcnn.errors import ConfigError, DataError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Dataset:
    """Images with their labels.

    Attributes:
        name: of the dataset.
        records: one per image, see `Record`; a `RecordStore`, which unpickles at each access: going through it takes
            time, holding on to all of it memory.
        categories: the dataset's own categories that are used, by id.
        report: what was kept and removed.
        repeat: how often each image comes in an epoch of training, on average.
    """

    name: str
    records: Sequence[Record]
    categories: tuple[Category, ...]
    report: Report
    repeat: float = 1.0

    @cached_property
    def sizes(self) -> np.ndarray:
        """(N, 2) height and width of every image, in pixels."""
        sizes = ((record["height"], record["width"]) for record in self.records)
        return np.fromiter(sizes, dtype=(np.int64, 2), count=len(self.records))

    @cached_property
    def shown_classes(self) -> np.ndarray:
        """(M, 2) number of an image and index of a class that it shows, each pair once; crowds show their class too."""
        shown = ({entry["category_id"] for entry in record["annotations"]} for record in self.records)
        pairs = ((image, index) for image, indices in enumerate(shown) for index in indices)
        return np.fromiter(pairs, dtype=(np.int64, 2))


def build_datasets(
    specs: Sequence[DatasetSpec],
    aliases: Mapping[str, str],
    label_space: LabelSpace | None = None,
    min_instances: int = 0,
    on_error: str = "raise",
    contents: Sequence[CocoData] | None = None,
) -> tuple[list[Dataset], LabelSpace]:
    """Reads datasets into records of one label space.

    Args:
        specs: which datasets.
        aliases: category name -> class name, for categories that mean the same under another name.
        label_space: classes to map to by name (of the training sets, or of a checkpoint); None makes one of these
            datasets.
        min_instances: images with fewer annotated objects (crowds not counted) are removed.
        on_error: "raise" makes a missing image file an error, "skip" removes the image with a warning that names it.
        contents: of the specifications' files, in their order, where they have been read already.

    Raises:
        ConfigError: a specification that does not fit its files.
        DataError: a fault in the files, or a category that is annotated but unknown to `label_space`.
    """
    _check_specs(specs)
    read = []
    for index, spec in enumerate(specs):
        data = read_dataset(spec) if contents is None else contents[index]
        read.append((spec, data, _chosen_categories(spec, data, aliases)))
    if label_space is None:
        classes = merge_categories({spec.name: categories for spec, _, categories in read}, aliases)
        vocabularies = merge_vocabularies({spec.name: data.vocabularies for spec, data, _ in read})
        label_space = LabelSpace(classes.categories, vocabularies)
    datasets = []
    for spec, data, categories in read:
        report = Report(notes=[*data.notes])
        classes = _class_map(spec, data, categories, aliases, label_space, report)
        entries = _entry_maps(spec, data, label_space)
        records = make_records(spec, data, classes, entries, min_instances, on_error, report)
        datasets.append(Dataset(spec.name, RecordStore(records), categories, report, spec.repeat))
        logger.info("%s: %s", spec.name, report)
        for note in report.notes:
            logger.warning("%s: %s", spec.name, note)
    return datasets, label_space


def _check_specs(specs: Sequence[DatasetSpec]) -> None:
    if not specs:
        raise ConfigError("no dataset is configured; expected at least one")
    repeated = [name for name, number in Counter(spec.name for spec in specs).items() if number > 1]
    if repeated:
        raise ConfigError(f"two datasets are named {repeated[0]!r}; give each entry a name of its own")


def _chosen_categories(spec: DatasetSpec, data: CocoData, aliases: Mapping[str, str]) -> tuple[Category, ...]:
    """The categories that the specification uses; it may name them as the file does, or by their alias."""
    if spec.classes is None:
        return data.categories
    names = {name for category in data.categories for name in (category["name"], class_name(category, aliases))}
    for wanted in spec.classes:
        if wanted not in names:
            raise ConfigError(
                f"dataset {spec.name!r}: classes names {wanted!r}, which is no category of {data.files[0]}"
                f"{suggest(wanted, names)}"
            )
    wanted = {*spec.classes}
    return tuple(c for c in data.categories if {c["name"], class_name(c, aliases)} & wanted)


def _class_map(
    spec: DatasetSpec,
    data: CocoData,
    categories: Sequence[Category],
    aliases: Mapping[str, str],
    space: LabelSpace,
    report: Report,
) -> ClassMap:
    """Maps categories to classes by name. A category that the network does not know must be without annotations."""
    index = space.index()
    known = [category for category in categories if class_name(category, aliases) in index]
    unknown = {category["id"]: category["name"] for category in categories if category not in known}
    if unknown:
        _check_unknown(spec, data, unknown, space)
        report.notes.append(f"categories unknown to the network (without annotations here): {some(unknown.values())}")
    # Where both say more of a class than its name (say what its points are called), they must say the same.
    merge_categories({"of the network": space.categories, spec.name: known}, aliases)
    class_index = {category["id"]: index[class_name(category, aliases)] for category in known}
    own: dict[int, int] = {}
    for category in sorted(known, key=lambda entry: entry["id"]):
        # Of several categories of one class, the one that bears the class's name stands for it.
        number = class_index[category["id"]]
        if number not in own or category["name"] == space.classes[number]:
            own[number] = category["id"]
    return ClassMap(class_index, dict(sorted(own.items())))


def _entry_maps(spec: DatasetSpec, data: CocoData, space: LabelSpace) -> EntryMaps:
    """For each of the dataset's vocabularies, from its own ids to the network's indices, by name."""
    maps: dict[str, dict[int | str, int]] = {}
    for vocabulary, entries in data.vocabularies.items():
        index = {entry["name"]: position for position, entry in enumerate(space.vocabularies.get(vocabulary, ()))}
        unknown = [entry["name"] for entry in entries if entry["name"] not in index]
        if unknown and index:
            raise DataError(
                f"dataset {spec.name!r}: {vocabulary} {some(map(repr, unknown))} are unknown to the network, which has "
                f"{some(index)}; evaluate on data labelled with the same words"
            )
        maps[vocabulary] = {entry["id"]: index[entry["name"]] for entry in entries if entry["name"] in index}
    return maps


def _check_unknown(spec: DatasetSpec, data: CocoData, unknown: Mapping[int, str], space: LabelSpace) -> None:
    annotated = Counter(
        unknown[entry["category_id"]]
        for entries in data.annotations.values()
        for entry in entries
        if entry["category_id"] in unknown
    )
    if annotated:
        listed = some(f"{name} ({number} annotations)" for name, number in annotated.most_common())
        raise DataError(
            f"dataset {spec.name!r} ({data.files[0]}): it annotates classes that the network does not know: {listed}; "
            f"leave them out with the dataset's classes=[...], or map their names with data.aliases; the network knows "
            f"{some(space.classes)}"
        )
