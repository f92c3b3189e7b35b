"""From a state dict into a network: all of it or a clear table of what does not fit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

from tabulate import tabulate
from torch import Tensor, nn

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import CheckpointError

__all__ = ["ModuleReport", "check_label_space", "format_report", "load_weights"]

ADVICE = "To leave some as initialised, name them: checkpoint.reinit=[pattern, ...]"
_SHOWN = 20


@dataclass
class ModuleReport:
    """What became of one module's tensors, by their names in the network or the file.

    Attributes:
        module: name in the network; members of a `ModuleDict` count as modules of their own.
        loaded: taken from the file.
        shape_differs: as "name (file shape) != (network shape)".
        missing: in the network only. unexpected: in the file only.
        reinit: left as initialised (or not read) since a `reinit` pattern says so.
    """

    module: str
    loaded: list[str] = field(default_factory=list)
    shape_differs: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    reinit: list[str] = field(default_factory=list)

    @property
    def faults(self) -> list[str]:
        """One phrase per tensor that does not fit."""
        return [
            *(f"shape differs: {text}" for text in self.shape_differs),
            *(f"missing in the file: {name}" for name in self.missing),
            *(f"only in the file: {name}" for name in self.unexpected),
        ]


def load_weights(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    source: str,
    reinit: Sequence[str] = (),
    advice: str = ADVICE,
) -> list[ModuleReport]:
    """Loads a state dict, all of it or nothing.

    Args:
        weights: the file's tensors by name.
        source: the file, for messages.
        reinit: patterns (`fnmatch`) of tensor names that are not loaded: they stay as initialised.
        advice: what to do about tensors that do not fit.

    Returns:
        One report per module of the network; print it with `format_report`.

    Raises:
        CheckpointError: a tensor that does not fit and that no pattern names (the table is in the text), or a pattern
            that matches nothing. The network is then unchanged.
    """
    own = model.state_dict()
    _check_patterns(reinit, [*own, *weights], source)
    reports = _compare(model, own, weights, reinit)
    faults = [fault for report in reports for fault in report.faults]
    if faults:
        raise CheckpointError(
            f"{source} does not fit the network: {len(faults)} tensors\n{format_report(reports)}\n"
            f"{_some(faults, separator='; ')}\n{advice}"
        )
    model.load_state_dict({name: weights[name] for report in reports for name in report.loaded}, strict=False)
    return reports


def format_report(reports: Sequence[ModuleReport]) -> str:
    """The reports as one table."""
    columns = ("loaded", "shape differs", "missing in file", "only in file", "left random")
    rows = [
        (r.module, len(r.loaded), len(r.shape_differs), len(r.missing), len(r.unexpected), len(r.reinit))
        for r in reports
    ]
    return tabulate(rows, headers=("module", *columns))


def check_label_space(stored: Mapping[str, Any], run: LabelSpace, source: str, fields: bool = True) -> None:
    """Compares a checkpoint's `label_space` with the run's: same classes, same order and, if `fields`, same fields of
    each category.

    Raises:
        CheckpointError: lists what differs.
    """
    theirs = LabelSpace.from_state(stored)
    if theirs.classes != run.classes:
        raise CheckpointError(
            f"{source}: its {len(theirs.classes)} classes are not the {len(run.classes)} of this run; "
            f"{_class_difference(theirs.classes, run.classes)}. "
            "Map names with data.aliases, or train new class layers with checkpoint.weights and checkpoint.reinit"
        )
    for ours, other in zip(run.categories, theirs.categories) if fields else ():
        shared = (set(ours) & set(other)) - {"id", "supercategory"}
        differing = sorted(key for key in shared if ours[key] != other[key])
        if differing:
            raise CheckpointError(
                f"{source}: class {ours['name']!r} was trained with other {', '.join(differing)}: "
                + "; ".join(f"{key} {other[key]!r}, in this run {ours[key]!r}" for key in differing)
            )

    for name, entries in run.vocabularies.items():
        mine = [entry["name"] for entry in entries]
        stored_names = [entry["name"] for entry in theirs.vocabularies.get(name, entries)]
        if mine != stored_names:
            raise CheckpointError(
                f"{source}: its {len(stored_names)} {name} are not the {len(mine)} of this run; "
                f"{_class_difference(stored_names, mine)}"
            )


def _class_difference(stored: Sequence[str], run: Sequence[str]) -> str:
    if set(stored) == set(run):
        places = [f"{a!r} / {b!r} at {index}" for index, (a, b) in enumerate(zip(stored, run)) if a != b]
        return f"another order (checkpoint / run): {_some(places)}"
    only_stored, only_run = sorted(set(stored) - set(run)), sorted(set(run) - set(stored))
    return f"only in the checkpoint: {_some(only_stored)}; only in this run: {_some(only_run)}"


def _compare(
    model: nn.Module, own: Mapping[str, Tensor], weights: Mapping[str, Tensor], reinit: Sequence[str]
) -> list[ModuleReport]:
    lists: dict[str, ModuleReport] = {}
    for name in [*own, *(name for name in weights if name not in own)]:
        module = _module_of(model, name)
        report = lists.setdefault(module, ModuleReport(module))
        if any(fnmatchcase(name, pattern) for pattern in reinit):
            report.reinit.append(name)
        elif name not in own:
            report.unexpected.append(name)
        elif name not in weights:
            report.missing.append(name)
        elif own[name].shape != weights[name].shape:
            report.shape_differs.append(f"{name} {tuple(weights[name].shape)} != {tuple(own[name].shape)}")
        else:
            report.loaded.append(name)
    return list(lists.values())


def _module_of(model: nn.Module, name: str) -> str:
    """The part of a tensor's name that stands for its module: the first word, or down to a ModuleDict's last member."""
    words, module, length = name.split("."), model, 1
    for index, word in enumerate(words[:-1]):
        child = module._modules.get(word)
        if isinstance(module, nn.ModuleDict):
            length = index + 1
        if child is None:
            break
        module = child
    return ".".join(words[:length])


def _check_patterns(patterns: Sequence[str], names: Sequence[str], source: str) -> None:
    for pattern in patterns:
        if not any(fnmatchcase(name, pattern) for name in names):
            raise CheckpointError(
                f"checkpoint.reinit: {pattern!r} matches no tensor of the network or of {source}; names are like "
                f"{', '.join(names[:3])}, and * stands for anything"
            )


def _some(words: Sequence[str], separator: str = ", ") -> str:
    """The first words, and how many more there are."""
    more = [f"and {len(words) - _SHOWN} more"] if len(words) > _SHOWN else []
    return separator.join([*words[:_SHOWN], *more]) or "none"
