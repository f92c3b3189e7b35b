"""Groups of attributes: what a vocabulary says that objects may be like, and what annotations say of them."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mtl_rcnn.data.coco_file import are_numbers
from mtl_rcnn.data.dataset_spec import suggest
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import DataError

logger = logging.getLogger(__name__)

VOCABULARY = "attributes"
"""Vocabulary of the groups, and the annotations' field {group: value}."""

CATEGORICAL, MULTILABEL, BINARY, SCALAR = KINDS = ("categorical", "multilabel", "binary", "scalar")

UNKNOWN = -1
"""Of a value of which nobody says whether it holds."""


@dataclass(frozen=True)
class Group:
    """One entry of the vocabulary.

    Attributes:
        name: of the group.
        kind: one of `KINDS`.
        values: names of its values; of a binary group its own name, of a scalar none.
        start: index of its first value among all groups' values; of a scalar, its index among the scalars.
        classes: class indices it belongs to.
        mirror: (len(values),) which value each one becomes in a mirrored image.
        mean, std: of a scalar, what it is normalised by.
    """

    name: str
    kind: str
    values: tuple[str, ...]
    start: int
    classes: frozenset[int]
    mirror: tuple[int, ...]
    mean: float = 0.0
    std: float = 1.0

    @property
    def columns(self) -> slice:
        """Of its values, among all groups' values."""
        return slice(self.start, self.start + len(self.values))

    @property
    def labels(self) -> list[str]:
        """Names of its values among all groups' values, such as "colour.red"."""
        return [self.name] if self.kind == BINARY else [f"{self.name}.{value}" for value in self.values]


def read_groups(label_space: LabelSpace, task: str) -> list[Group]:
    """The groups of the vocabulary `attributes`, in its order, all scalars last.

    An entry is {"name", "type": one of `KINDS`}, with "values": [names] if it is categorical or multilabel, "mean" and
    "std" if it is a scalar, and, where it does not belong to all, "classes": [names]. "flip_pairs": [[name, name], ...]
    are values that a mirror swaps.

    Raises:
        ConfigError: there is no such vocabulary.
        DataError: an entry of another form; names it.
    """
    entries = label_space.vocabulary(VOCABULARY, task)
    groups: list[Group] = []
    channels = 0
    for entry in sorted(entries, key=lambda entry: entry.get("type") == SCALAR):
        values = _values_of(entry)
        scalars = sum(group.kind == SCALAR for group in groups)
        groups.append(
            Group(
                name=entry["name"],
                kind=entry["type"],
                values=values,
                start=scalars if entry["type"] == SCALAR else channels,
                classes=_classes_of(entry, label_space),
                mirror=_mirror_of(entry, values),
                mean=_number_of(entry, "mean", 0.0),
                std=_number_of(entry, "std", 1.0),
            )
        )
        channels += len(values)
    return groups


class Labels:
    """Reads `attributes` of annotations as numbers: V values of all groups, and S scalars."""

    def __init__(self, groups: Sequence[Group]) -> None:
        self.groups = {group.name: group for group in groups}
        self.values = sum(len(group.values) for group in groups)
        self.scalars = sum(group.kind == SCALAR for group in groups)

    def __call__(self, annotations: Sequence[Mapping[str, Any]]) -> tuple[np.ndarray, np.ndarray]:
        """(N, V) int64: 1 holds, 0 does not, -1 unknown; and (N, S) float64, nan where unknown. Of a form that
        `expected_label` takes."""
        values = np.full((len(annotations), self.values), UNKNOWN)
        scalars = np.full((len(annotations), self.scalars), np.nan)
        for row, annotation in enumerate(annotations):
            for name, label in (annotation.get(VOCABULARY) or {}).items():
                group = self.groups.get(name)
                if group is None or label is None:
                    continue
                if group.kind == SCALAR:
                    scalars[row, group.start] = label
                elif group.kind == BINARY:
                    values[row, group.start] = bool(label)
                else:
                    chosen = label if group.kind == MULTILABEL else [label]
                    values[row, group.columns] = [value in chosen for value in group.values]
        return values, scalars


def mirrored_columns(groups: Sequence[Group]) -> list[int]:
    """(V,) which value of all groups each one becomes in a mirrored image."""
    return [group.start + index for group in groups for index in group.mirror]


def any_known(values: np.ndarray, scalars: np.ndarray) -> np.ndarray:
    """(N,) bool: of which anything is known."""
    return (values != UNKNOWN).any(axis=1) | np.isfinite(scalars).any(axis=1)


def expected_label(group: Group, label: Any) -> str:
    """What was expected in place of a label of another type, "" if it is of the right one."""
    if group.kind == CATEGORICAL:
        return "" if isinstance(label, str) else f"one name of {', '.join(group.values)}"
    if group.kind == MULTILABEL:
        right = isinstance(label, list | tuple) and all(isinstance(value, str) for value in label)
        return "" if right else f"a list of names of {', '.join(group.values)}"
    if group.kind == BINARY:
        return "" if isinstance(label, bool) else "true or false"
    return "" if not isinstance(label, bool) and are_numbers([label]) else "a finite number"


def short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _values_of(entry: Mapping[str, Any]) -> tuple[str, ...]:
    """Names of the values of a vocabulary's entry."""
    kind, values = entry.get("type"), entry.get("values")
    if kind not in KINDS:
        raise _entry_fault(entry, f"has the type {kind!r}; expected {', '.join(KINDS)}{suggest(str(kind), KINDS)}")
    if kind in (BINARY, SCALAR):
        if values:
            raise _entry_fault(entry, f"is {kind} and has values; remove them, or give it another type")
        return (entry["name"],) if kind == BINARY else ()
    named = isinstance(values, list | tuple) and all(isinstance(value, str) and value for value in values)
    if not named or len(set(values)) != len(values) or not values:
        raise _entry_fault(entry, f"is {kind} and has the values {short(values)}; expected a list of names that differ")
    return tuple(values)


def _classes_of(entry: Mapping[str, Any], label_space: LabelSpace) -> frozenset[int]:
    """The class indices that an entry belongs to. A name of no class is told: it may be of a class that was not
    selected."""
    names = entry.get("classes")
    if names is None:
        return frozenset(range(len(label_space.classes)))
    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise _entry_fault(entry, f"has the classes {short(names)}; expected a list of names")
    index = label_space.index()
    for name in names:
        if name not in index:
            hint = suggest(name, index)
            logger.warning(
                "attribute '%s' belongs to '%s', which is no class of the network%s", entry["name"], name, hint
            )
    return frozenset(index[name] for name in names if name in index)


def _mirror_of(entry: Mapping[str, Any], values: Sequence[str]) -> tuple[int, ...]:
    swapped = {name: name for name in values}
    pairs = entry.get("flip_pairs") or []
    for pair in pairs if isinstance(pairs, list | tuple) else [pairs]:
        if not isinstance(pair, list | tuple) or len(pair) != 2 or not set(pair) <= set(values):
            raise _entry_fault(entry, f"has the flip_pairs {short(pairs)}; expected pairs of its values")
        swapped |= {pair[0]: pair[1], pair[1]: pair[0]}
    return tuple(list(values).index(swapped[name]) for name in values)


def _number_of(entry: Mapping[str, Any], key: str, default: float) -> float:
    value = entry.get(key, default)
    if isinstance(value, bool) or not are_numbers([value]) or (key == "std" and value <= 0):
        raise _entry_fault(
            entry, f"has the {key} {short(value)}; expected a number{' above 0' if key == 'std' else ''}"
        )
    return float(value)


def _entry_fault(entry: Mapping[str, Any], text: str) -> DataError:
    return DataError(f"vocabulary '{VOCABULARY}': '{entry['name']}' {text}")
