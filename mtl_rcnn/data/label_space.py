"""The classes of a run: several datasets' categories merged by name. Stored in every checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from mtl_rcnn.errors import ConfigError, DataError

Category = Mapping[str, Any]
"""One entry of a COCO JSON's `categories`: `id`, `name`, and whatever else tasks read."""

Vocabularies = Mapping[str, Sequence[Mapping[str, Any]]]
"""What else labels speak of, by name: lists of entries with a `name` each (`sem_seg_classes`, `attributes`, ...), in a
COCO JSON under `vocabularies`. `id`, where there is one, is what a dataset's files write for the entry."""

LOCAL_FIELDS = ("id", "supercategory", "color")
"""Bookkeeping of one file: two datasets may fill these differently without contradiction, the first one's are kept."""


@dataclass(frozen=True)
class LabelSpace:
    """The classes a network knows.

    Attributes:
        categories: one COCO category per class, index = class id of the network; raw fields of the JSON (`name`, and
            whatever else tasks read, such as a skeleton) are kept as plain JSON values, but for the datasets' own ids.
        vocabularies: what labels other than classes speak of, likewise; see `Vocabularies`.

    Raises:
        DataError: two categories have the same name.
    """

    categories: tuple[Category, ...]
    vocabularies: Vocabularies = field(default_factory=dict)

    def __post_init__(self) -> None:
        repeated = sorted({name for name in self.classes if self.classes.count(name) > 1})
        if repeated:
            raise DataError(f"label space: class names must differ, but these occur twice: {', '.join(repeated)}")

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names by class index."""
        return tuple(category["name"] for category in self.categories)

    def index(self) -> dict[str, int]:
        """Class index by class name."""
        return {name: index for index, name in enumerate(self.classes)}

    def vocabulary(self, name: str, task: str) -> tuple[Mapping[str, Any], ...]:
        """Entries of a vocabulary, index = position.

        Args:
            task: that needs it, for the message.

        Raises:
            ConfigError: no dataset has it.
        """
        if not self.vocabularies.get(name):
            known = ", ".join(self.vocabularies) or "none"
            raise ConfigError(
                f"the task '{task}' needs the vocabulary '{name}', which no training set has (found: {known}); list it "
                f"in a COCO JSON under 'vocabularies', or in the dataset's entry: vocabularies: {{{name}: [...]}}"
            )
        return tuple(self.vocabularies[name])

    def state(self) -> dict[str, Any]:
        """Plain JSON values, for checkpoints and manifests."""
        return {
            "categories": [copy.deepcopy(dict(category)) for category in self.categories],
            "vocabularies": {
                name: [copy.deepcopy(dict(entry)) for entry in entries] for name, entries in self.vocabularies.items()
            },
        }

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> LabelSpace:
        """Inverse of `state`."""
        vocabularies = {  # checkpoints of version 0.1 have none
            name: tuple(dict(entry) for entry in entries) for name, entries in state.get("vocabularies", {}).items()
        }
        return LabelSpace(tuple(dict(category) for category in state["categories"]), vocabularies)


def class_name(category: Category, aliases: Mapping[str, str]) -> str:
    """The class that a dataset's category belongs to."""
    return aliases.get(category["name"], category["name"])


def merge_categories(per_dataset: Mapping[str, Sequence[Category]], aliases: Mapping[str, str]) -> LabelSpace:
    """Merges the datasets' categories by (aliased) name; their fields are united.

    Args:
        per_dataset: dataset name -> its categories. Classes are numbered in order of first appearance: datasets as
            given, within a dataset by category id.
        aliases: category name -> class name, for categories that mean the same under another name.

    Raises:
        DataError: two datasets give one class contradicting fields.
    """
    merged: dict[str, dict[str, Any]] = {}
    origin: dict[tuple[str, str], str] = {}
    for dataset, categories in per_dataset.items():
        for category in sorted(categories, key=lambda entry: entry.get("id", 0)):
            name = class_name(category, aliases)
            into = merged.setdefault(name, {"name": name})
            _unite(
                into,
                category,
                f"class {name!r}",
                dataset,
                origin,
                "give one of the classes another name with data.aliases",
            )
    return LabelSpace(tuple(merged.values()))


def merge_vocabularies(
    per_dataset: Mapping[str, Vocabularies], same_ids: bool = False
) -> dict[str, tuple[Mapping[str, Any], ...]]:
    """Unites the datasets' vocabularies by their entries' names, in order of first appearance.

    Args:
        per_dataset: dataset (or file) -> its vocabularies.
        same_ids: whether they are of one dataset, so that `id` is a field like others; ids are left out otherwise.

    Raises:
        DataError: two datasets give one entry contradicting fields.
    """
    merged: dict[str, dict[str, dict[str, Any]]] = {}
    origin: dict[tuple[str, str], str] = {}
    for dataset, vocabularies in per_dataset.items():
        for vocabulary, entries in vocabularies.items():
            for entry in entries:
                name = entry["name"]
                into = merged.setdefault(vocabulary, {}).setdefault(name, {"name": name})
                _unite(
                    into, entry, f"{vocabulary} {name!r}", dataset, origin, "rename one of the two in its vocabulary"
                )
                if same_ids and into.setdefault("id", entry["id"]) != entry["id"]:
                    raise DataError(
                        f"{dataset}: {vocabulary} {name!r} has the id {entry['id']!r}, in another file of the same "
                        f"dataset {into['id']!r}; make them equal"
                    )
    return {vocabulary: tuple(entries.values()) for vocabulary, entries in merged.items()}


def _unite(
    into: dict[str, Any],
    entry: Mapping[str, Any],
    named: str,
    dataset: str,
    origin: dict[tuple[str, str], str],
    remedy: str,
) -> None:
    """Adds an entry's fields to what it is united with. `origin` remembers which dataset gave each (named, field)."""
    for key, value in entry.items():
        if key in ("id", "name"):
            continue
        if key not in into:
            into[key] = value
            origin[named, key] = dataset
        elif into[key] != value and key not in LOCAL_FIELDS:
            raise DataError(
                f"{named}: datasets {origin[named, key]!r} and {dataset!r} contradict each other in the field {key!r} "
                f"({_short(into[key])} / {_short(value)}); make them equal, or {remedy}"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
