"""Layers with rows per class: from the classes of a file to the classes of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from detectron2.data.datasets.builtin_meta import COCO_CATEGORIES
from torch import Tensor

from mtl_rcnn.modeling.slots import ClassRows

COCO_NAMES = {entry["id"]: entry["name"] for entry in COCO_CATEGORIES if entry["isthing"]}
"""COCO's 80 classes by their ids 1..90."""


@dataclass(frozen=True)
class ClassMatch:
    """Which class of a file each class of the run is.

    Attributes:
        rows: per class of the run, its index among the file's foreground classes; None: the classes do not match.
        told: how that was decided, in words.
    """

    rows: tuple[int, ...] | None
    told: str


def match_classes(count: int, run: Sequence[str]) -> ClassMatch:
    """Matches a file's `count` foreground classes, which have no names, with those of the run.

    80 classes are taken for COCO's in their order, 90 for COCO's ids 1..90, if they hold every class of the run. Else
    the same number of classes is taken for the same classes in the same order.
    """
    names = {80: list(COCO_NAMES.values()), 90: [COCO_NAMES.get(index + 1, "") for index in range(90)]}.get(count, [])
    if names and set(run) <= set(names):
        return ClassMatch(tuple(names.index(name) for name in run), f"classes matched by name with COCO's {count}")
    if count == len(run):
        return ClassMatch(tuple(range(count)), f"the file names no classes: its {count} are taken in the run's order")
    return ClassMatch(None, f"the file has {count} classes, the run has {len(run)}")


def count_classes(tensors: Mapping[str, Tensor], layers: Mapping[str, ClassRows]) -> int | None:
    """The file's foreground classes, told by a layer that has a row for the background too; None without one."""
    for name, value in tensors.items():
        layout = _layout(name, layers)
        if layout is not None and layout.background:
            return value.shape[0] // layout.rows - 1
    return None


def choose_rows(
    tensors: Mapping[str, Tensor], layers: Mapping[str, ClassRows], chosen: Sequence[int], background_first: bool
) -> dict[str, Tensor]:
    """The tensors with their class rows in the run's order: foreground classes first, background last.

    Args:
        tensors: by this project's names.
        layers: {beginning of a name: its rows}.
        chosen: per class of the run, its index among the file's foreground classes.
        background_first: the file has the background as class 0 of every layer (torchvision). Otherwise it is the
            last class, and only of layers that have one here (Detectron2).
    """
    result = dict(tensors)
    for name, value in tensors.items():
        layout = _layout(name, layers)
        if layout is not None:
            result[name] = _choose(value, layout, chosen, background_first)
    return result


def _choose(value: Tensor, layout: ClassRows, chosen: Sequence[int], background_first: bool) -> Tensor:
    if value.dim() == 0 or value.shape[0] % layout.rows:
        return value  # its shape will tell
    per_class = value.unflatten(0, (-1, layout.rows))
    if len(per_class) <= max(chosen, default=0) + background_first:
        return value  # class-agnostic or of another kind: its shape will tell
    foreground, background = (per_class[1:], per_class[:1]) if background_first else (per_class, per_class[-1:])
    parts = [foreground[list(chosen)], *([background] if layout.background else [])]
    return torch.cat(parts).flatten(0, 1)


def _layout(name: str, layers: Mapping[str, ClassRows]) -> ClassRows | None:
    return next((rows for start, rows in layers.items() if name.startswith(start)), None)
