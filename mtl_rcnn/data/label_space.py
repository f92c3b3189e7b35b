"""The classes of a run: several datasets' categories merged by name. Stored in every checkpoint."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mtl_rcnn.errors import DataError

Category = Mapping[str, Any]
"""One entry of a COCO JSON's `categories`: `id`, `name`, and whatever else tasks read."""

LOCAL_FIELDS = ("id", "supercategory", "color")
"""Bookkeeping of one file: two datasets may fill these differently without contradiction, the first one's are kept."""


@dataclass(frozen=True)
class LabelSpace:
    """The classes a network knows.

    Attributes:
        categories: one COCO category per class, index = class id of the network; raw fields of the JSON (`name`, and
            whatever else tasks read, such as a skeleton) are kept as plain JSON values, but for the datasets' own ids.

    Raises:
        DataError: two categories have the same name.
    """

    categories: tuple[Category, ...]

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

    def state(self) -> dict[str, Any]:
        """Plain JSON values, for checkpoints and manifests."""
        return {"categories": [copy.deepcopy(dict(category)) for category in self.categories]}

    @staticmethod
    def from_state(state: Mapping[str, Any]) -> LabelSpace:
        """Inverse of `state`."""
        return LabelSpace(tuple(dict(category) for category in state["categories"]))


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
            _unite(merged.setdefault(name, {"name": name}), category, name, dataset, origin)
    return LabelSpace(tuple(merged.values()))


def _unite(
    into: dict[str, Any], category: Category, name: str, dataset: str, origin: dict[tuple[str, str], str]
) -> None:
    """Adds a category's fields to a class. `origin` remembers which dataset gave each (class, field)."""
    for field, value in category.items():
        if field in ("id", "name"):
            continue
        if field not in into:
            into[field] = value
            origin[name, field] = dataset
        elif into[field] != value and field not in LOCAL_FIELDS:
            raise DataError(
                f"class {name!r}: datasets {origin[name, field]!r} and {dataset!r} contradict each other in the "
                f"category's field {field!r} ({_short(into[field])} / {_short(value)}); make them equal in the JSON, "
                "or give one of the classes another name with data.aliases"
            )


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
