"""The start of a run: the weights of one file, tasks' layers of others grafted onto them, and a table of what came
from where."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.pretrained.class_layers import choose_rows, count_classes, match_classes
from mtl_rcnn.engine.pretrained.names import Renamed, rename
from mtl_rcnn.engine.pretrained.norms import fit_norms
from mtl_rcnn.engine.pretrained.weight_file import STRIDE, WeightFile, read_weight_file
from mtl_rcnn.engine.weights import ADVICE, check_label_space, format_report, load_weights
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.slots import ClassRows

_log = logging.getLogger(__name__)
_BOTTOM_UP = "backbone.bottom_up"
_PYRAMID = "backbone (pyramid)"
_SHOWN = 6
_WITH_BOTTLENECKS = (50, 101)


def load_initial_weights(cfg: DictConfig, model: MultiTaskRCNN, label_space: LabelSpace) -> None:
    """Gives a network the weights that `checkpoint` names, and logs what came from where.

    `checkpoint.weights` gives all it has; `checkpoint.graft` ({task: file}) replaces the layers of single tasks.
    A checkpoint of this project must fit completely. Of any other file, the trunk must; tasks of which it has nothing
    start at random, with a warning.

    Raises:
        CheckpointError: a file that cannot be read or does not fit; the network is then unchanged.
        ConfigError: pixels or strides the weights were not trained with, or a graft of a task that is not selected.
    """
    base = _adapt(cfg.checkpoint.weights, cfg, model, label_space)
    weights, told = dict(base.tensors), [f"weights from {base.source} ({base.kind})", *base.notes]
    parts = named_parts(model)
    for task, source in cfg.checkpoint.graft.items():
        _check_graft(task, parts)
        graft = _adapt(source, cfg, model, label_space)
        weights = {name: value for name, value in weights.items() if name not in parts[task]} | _only(
            graft, parts[task]
        )
        told += [f"{task} from {graft.source} ({graft.kind})", *graft.notes, *_differing_trunks(base, graft)]
    random = [] if base.own else _parts_without_weights(parts, weights, base.source)
    left = [*cfg.checkpoint.reinit, *(name for part in random for name in parts[part])]
    reports = load_weights(model, weights, base.source, left, base.advice)
    _log.info("%s\n%s", "\n".join(told), format_report(reports))
    learning = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in random:
        stays = "" if learning & {*parts[part]} else ", and it is frozen: it stays so"
        _log.warning("%s: 0 of %d tensors are in %s; it starts at random%s", part, len(parts[part]), base.source, stays)


def named_parts(model: MultiTaskRCNN) -> dict[str, list[str]]:
    """{part: names of its tensors}: the bottom-up trunk, the pyramid, and every task by its name."""
    paths = {id(module): f"{path}." for path, module in model.named_modules()}
    starts = {_BOTTOM_UP: f"{_BOTTOM_UP}.", _PYRAMID: "backbone."}
    starts |= {task.name: paths[id(task)] for task in model.tasks()}
    parts: dict[str, list[str]] = {part: [] for part in starts}
    for name in model.state_dict():
        parts[next(part for part, start in starts.items() if name.startswith(start))].append(name)
    return parts


@dataclass(frozen=True)
class _Adapted:
    """A file's tensors as the network wants them, and what to tell of them: `advice` where they do not fit."""

    source: str
    kind: str
    own: bool
    tensors: Mapping[str, Tensor]
    notes: tuple[str, ...] = ()
    advice: str = ADVICE


def _adapt(source: str, cfg: DictConfig, model: MultiTaskRCNN, label_space: LabelSpace) -> _Adapted:
    file = read_weight_file(str(source))
    renamed = rename(file, model)
    _check_expectations(cfg, renamed, file.source)
    layers = _class_layers(model)
    if file.own is not None:
        _check_classes(file, model, label_space, layers, list(cfg.checkpoint.reinit))
        return _Adapted(file.source, renamed.kind, True, renamed.tensors)
    eps = renamed.eps if cfg.checkpoint.source_eps is None else float(cfg.checkpoint.source_eps)
    tensors = fit_norms(renamed.tensors, model, eps, renamed.folded_norms)
    unused = [f"not used: {_some(renamed.unused)}"] if renamed.unused else []
    count = count_classes(tensors, layers)
    if count is None:
        return _Adapted(file.source, renamed.kind, False, tensors, (*renamed.notes, *unused))
    match = match_classes(count, label_space.classes)
    if match.rows is not None:
        tensors = choose_rows(tensors, layers, match.rows, renamed.background_first)
    elif renamed.background_first:  # shapes could fit by chance, with every class one place off
        tensors = {name: value for name, value in tensors.items() if not name.startswith(tuple(layers))}
    fresh = ",".join(f"{start}*" for start in layers)
    advice = f"{ADVICE}. {match.told[0].upper()}{match.told[1:]}; for new class layers: 'checkpoint.reinit=[{fresh}]'"
    return _Adapted(file.source, renamed.kind, False, tensors, (*renamed.notes, match.told, *unused), advice)


def _class_layers(model: MultiTaskRCNN) -> dict[str, ClassRows]:
    return {start.format(name=task.name): rows for task in model.tasks() for start, rows in task.class_rows.items()}


def _check_classes(
    file: WeightFile, model: MultiTaskRCNN, label_space: LabelSpace, layers: Mapping[str, ClassRows], reinit: list[str]
) -> None:
    """Our own files know their classes: they must be the run's, unless every class layer starts anew. What else a
    category says (a skeleton) must agree too, unless the user has named layers that start anew."""
    kept = [name for name in model.state_dict() if name.startswith(tuple(layers)) and name in file.tensors]
    if all(any(fnmatchcase(name, pattern) for pattern in reinit) for name in kept):
        return
    check_label_space(file.own["label_space"], label_space, file.source, fields=not reinit)


def _check_expectations(cfg: DictConfig, renamed: Renamed, source: str) -> None:
    """The network's input and strides must be those that the weights were trained with."""
    wrong = {key: value for key, value in renamed.expects.items() if not _equal(OmegaConf.select(cfg, key), value)}
    if OmegaConf.select(cfg, "model.backbone.depth") not in _WITH_BOTTLENECKS:
        wrong.pop(STRIDE, None)
    if wrong and not cfg.checkpoint.check_pixels:
        _log.warning("%s: trained with other %s", source, ", ".join(wrong))
    elif wrong:
        overrides = " ".join(f"{key}={_override(value)}" for key, value in wrong.items())
        raise ConfigError(
            f"{source}: weights of {renamed.kind} were trained with other {', '.join(wrong)} "
            f"(checkpoint.check_pixels=false takes them all the same); add {overrides}"
        )


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, tuple):
        return found is not None and max(abs(a - b) for a, b in zip(found, expected, strict=True)) < 0.01
    return found == expected


def _override(value: Any) -> str:
    if isinstance(value, tuple):
        return f"[{','.join(f'{number:g}' for number in value)}]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _check_graft(task: str, parts: Mapping[str, Sequence[str]]) -> None:
    tasks = [part for part in parts if part not in (_BOTTOM_UP, _PYRAMID)]
    if task not in tasks:
        raise ConfigError(f"checkpoint.graft.{task}: no such task in this run; selected are {', '.join(tasks)}")


def _only(graft: _Adapted, names: Sequence[str]) -> dict[str, Tensor]:
    found = {name: graft.tensors[name] for name in names if name in graft.tensors}
    if not found:
        raise CheckpointError(f"{graft.source}: has nothing to graft, none of {', '.join(names[:3])}, ...")
    return found


def _differing_trunks(base: _Adapted, graft: _Adapted) -> list[str]:
    theirs = {name for name in graft.tensors if name.startswith("backbone.") and name in base.tensors}
    if all(torch.equal(base.tensors[name], graft.tensors[name]) for name in theirs):
        return []
    return [f"its trunk differs from that of {base.source}: train before you rely on it"]


def _parts_without_weights(parts: Mapping[str, Sequence[str]], weights: Mapping[str, Tensor], source: str) -> list[str]:
    empty = [part for part, names in parts.items() if names and not any(name in weights for name in names)]
    if _BOTTOM_UP in empty:
        raise CheckpointError(f"{source}: has no weights of the trunk ({', '.join(parts[_BOTTOM_UP][:3])}, ...)")
    return empty


def _some(names: Sequence[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more
