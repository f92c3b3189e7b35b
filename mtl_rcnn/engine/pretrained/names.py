"""From the names of Detectron2, Caffe2, torchvision and timm to the names of this project's network."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from detectron2.checkpoint.c2_model_loading import convert_c2_detectron_names
from torch import Tensor

from mtl_rcnn.engine.pretrained.weight_file import STRIDE, Expectations, WeightFile, pixels
from mtl_rcnn.errors import CheckpointError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.timm_trunk import TimmFeatures

TORCHVISION = {**pixels("RGB", (123.675, 116.28, 103.53), (58.395, 57.12, 57.375)), STRIDE: False}
"""ImageNet's statistics in torchvision's manner."""
CAFFE2 = {**pixels("BGR", (103.53, 116.28, 123.675), (1.0, 1.0, 1.0)), STRIDE: True}
"""ImageNet's mean in Caffe's manner, as the original ResNets were trained."""


@dataclass(frozen=True)
class Renamed:
    """A file's tensors under this project's names.

    Attributes:
        kind: where the file comes from, in words.
        tensors: by the network's names; may hold names that this network lacks, where its tasks' layers differ.
        unused: names in the file that mean nothing to this network's trunk and tasks.
        background_first: see `class_layers.choose_rows`.
        expects: what the file is known to expect of the configuration.
        eps: of the file's batch norms; None: the network's own.
        folded_norms: batch norms are scale and shift alone, their statistics did nothing.
        notes: conventions of the source that differ from this project's.
    """

    kind: str
    tensors: Mapping[str, Tensor]
    unused: tuple[str, ...]
    background_first: bool = False
    expects: Expectations = field(default_factory=dict)
    eps: float | None = 1e-5
    folded_norms: bool = False
    notes: tuple[str, ...] = ()


def rename(file: WeightFile, model: MultiTaskRCNN) -> Renamed:
    """Gives a file's tensors this project's names.

    Raises:
        CheckpointError: names of no known layout, listed with the layouts that are known.
    """
    names = set(file.tensors)
    if file.own is not None or _starts(names, "roi_heads.detector.", "image_tasks."):
        return Renamed("mtl_rcnn", file.tensors, (), expects=file.expects, eps=None)
    if file.partial_names or _starts(names, "backbone.bottom_up.", "proposal_generator."):
        return _detectron2(file, model)
    if _starts(names, "backbone.body.", "rpn.head."):
        return _torchvision_detector(file, model)
    if isinstance(getattr(model.backbone, "bottom_up", None), TimmFeatures):
        return _timm(file, model)
    if "layer1.0.conv1.weight" in names:
        return _resnet(file, model)
    raise CheckpointError(
        f"{file.source}: names of no known layout ({', '.join(sorted(names)[:5])}, ...); known are Detectron2 "
        "(backbone.bottom_up.res2...), Caffe2 (res2_0_branch2a_w), torchvision detection (backbone.body.layer1...), "
        "torchvision and timm ResNets (layer1.0.conv1.weight), timm's where the trunk is one of its models, and this "
        "project's own"
    )


def _detectron2(file: WeightFile, model: MultiTaskRCNN) -> Renamed:
    tensors = dict(file.tensors)
    if file.caffe2:
        tensors = _from_caffe2(tensors)
    if file.partial_names:
        tensors = _complete(tensors, [_to_detectron2(name, model) for name in model.state_dict()])
    found = {name: _by_prefix(name, _detectron2_prefixes(model)) for name in tensors}
    renamed = {ours: tensors[name] for name, ours in found.items() if ours}
    kind = "Caffe2 (Detectron)" if file.caffe2 else "Detectron2"
    unused = tuple(name for name, ours in found.items() if not ours and name not in ("pixel_mean", "pixel_std"))
    expects = CAFFE2 if file.caffe2 else _stored_pixels(tensors) or _BY_AUTHOR.get(file.author, {})
    told = () if expects else ("the file does not tell its pixels' mean, deviation and order: see model.pixel_mean",)
    folded = file.caffe2 and not any("_gn_" in name for name in file.tensors)
    return Renamed(kind, renamed, unused, expects=expects, folded_norms=folded, notes=told)


_BY_AUTHOR = {"torchvision": TORCHVISION, "Detectron2 Model Zoo": CAFFE2}
"""What the files of Detectron2's zoo expect: those it converted, and those it trained from MSRA's ResNets."""


def _torchvision_detector(file: WeightFile, model: MultiTaskRCNN) -> Renamed:
    rules: list[Rule] = [*_PYRAMID, *((rf"backbone\.body\.{theirs}", ours) for theirs, ours in _RESNET)]
    for task in model.tasks():
        rules += [(theirs, ours.replace("{name}", task.name)) for theirs, ours in task.torchvision_names.items()]
    renamed, unused = _by_rules(file.tensors, rules)
    official = re.fullmatch(r"\w+_resnet50_fpn_coco-[0-9a-f]{8}\.pth", file.file_name) is not None
    _refuse_halves(file.source, unused)
    return Renamed(
        "torchvision detection",
        renamed,
        unused,
        background_first=True,
        expects=TORCHVISION,
        eps=0.0 if official else 1e-5,
        notes=(
            f"batch norm eps taken as {'0 (an official COCO file)' if official else '1e-5'}: checkpoint.source_eps "
            "says otherwise",
            "torchvision rounds anchors to whole pixels; here they are exact",
            "torchvision's RoIAlign is not aligned (half a pixel off) and takes 2 samples per bin side; here it is "
            "aligned, and pooler_sampling_ratio of each task says how many (0: adaptive)",
        ),
    )


def _resnet(file: WeightFile, model: MultiTaskRCNN) -> Renamed:
    renamed, unused = _by_rules(file.tensors, _RESNET)
    _refuse_halves(file.source, unused)
    return Renamed("torchvision or timm ResNet", renamed, unused, expects=TORCHVISION | file.expects)


def _timm(file: WeightFile, model: MultiTaskRCNN) -> Renamed:
    body, wanted = _BOTTOM + "body.", model.state_dict()
    renamed = {body + name: value for name, value in file.tensors.items() if body + name in wanted}
    unused = tuple(name for name in file.tensors if body + name not in wanted)
    told = (
        () if file.expects else ("the file does not tell its pixels' mean and deviation: compare with model.pixel_*",)
    )
    return Renamed("timm", renamed, unused, expects=file.expects, eps=None, notes=told)


Rule = tuple[str, str | Callable[[re.Match[str]], str]]
"""A pattern of whole names, and what they become."""


def _at_stage(ours: str) -> Callable[[re.Match[str]], str]:
    """Torchvision counts a ResNet's stages from 1, Detectron2 from 2, after the stem."""
    return lambda match: _BOTTOM + ours.format(int(match[1]) + 1, *match.groups()[1:])


def _at_level(ours: str) -> Callable[[re.Match[str]], str]:
    """Torchvision counts the pyramid's levels from 0, Detectron2 calls them by the logarithm of their stride."""
    return lambda match: ours.format(int(match[1]) + 2) + match[2]


_BOTTOM = "backbone.bottom_up."
_RESNET: list[Rule] = [
    (r"conv1\.(\w+)", _BOTTOM + r"stem.conv1.\1"),
    (r"bn1\.(\w+)", _BOTTOM + r"stem.conv1.norm.\1"),
    (r"layer(\d)\.(\d+)\.conv(\d)\.(\w+)", _at_stage("res{}.{}.conv{}.{}")),
    (r"layer(\d)\.(\d+)\.bn(\d)\.(\w+)", _at_stage("res{}.{}.conv{}.norm.{}")),
    (r"layer(\d)\.(\d+)\.downsample\.0\.(\w+)", _at_stage("res{}.{}.shortcut.{}")),
    (r"layer(\d)\.(\d+)\.downsample\.1\.(\w+)", _at_stage("res{}.{}.shortcut.norm.{}")),
]
"""Whole names of a torchvision ResNet -> names here."""
_PYRAMID: list[Rule] = [
    (rf"backbone\.fpn\.{theirs}\.(\d){place}\.(\w+)", _at_level(f"backbone.{ours}{{}}.{leaf}"))
    for theirs, ours in (("inner_blocks", "fpn_lateral"), ("layer_blocks", "fpn_output"))
    for place, leaf in (("", ""), (r"\.0", ""), (r"\.1", "norm."))
]
"""Convolutions of a torchvision pyramid, before and since its version 0.13, and their norms."""


def _from_caffe2(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    log = logging.getLogger(convert_c2_detectron_names.__module__)
    level = log.level
    log.setLevel(logging.WARNING)  # it tells of every layer; the report does that
    try:
        named = convert_c2_detectron_names(dict(tensors))[0]
        # A fixed enlargement, which the head here does by interpolation.
        return {name: value for name, value in named.items() if ".keypoint_head.score." not in name}
    finally:
        log.setLevel(level)


def _by_rules(tensors: Mapping[str, Tensor], rules: Sequence[Rule]) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    renamed, unused = {}, []
    for name, value in tensors.items():
        for pattern, ours in rules:
            match = re.fullmatch(pattern, name)
            if match:
                renamed[ours(match) if callable(ours) else match.expand(ours)] = value
                break
        else:
            unused.append(name)
    return renamed, tuple(unused)


def _detectron2_prefixes(model: MultiTaskRCNN) -> dict[str, str]:
    prefixes = {"backbone.": "backbone."}
    for task in model.tasks():
        prefixes |= {theirs: ours.format(name=task.name) for theirs, ours in task.detectron2_names.items()}
    return prefixes


def _to_detectron2(name: str, model: MultiTaskRCNN) -> str | None:
    return _by_prefix(name, {ours: theirs for theirs, ours in _detectron2_prefixes(model).items()})


def _by_prefix(name: str, prefixes: Mapping[str, str]) -> str | None:
    for start, replacement in prefixes.items():
        if name.startswith(start):
            return replacement + name.removeprefix(start)
    return None


def _complete(tensors: Mapping[str, Tensor], wanted: list[str | None]) -> dict[str, Tensor]:
    """Names with their beginning, where exactly one wanted name ends with them."""
    completed = {}
    for name, value in tensors.items():
        whole = [full for full in wanted if full is not None and f".{full}".endswith(f".{name}")]
        completed[whole[0] if len(whole) == 1 else name] = value
    return completed


def _stored_pixels(tensors: Mapping[str, Tensor]) -> Expectations:
    """Detectron2's older checkpoints hold mean and deviation. The order of the channels is told by ImageNet's mean, of
    which blue is the smallest; other means do not tell it."""
    if not {"pixel_mean", "pixel_std"} <= set(tensors):
        return {}
    mean, std = (tuple(tensors[name].flatten().tolist()) for name in ("pixel_mean", "pixel_std"))
    known = pixels("BGR" if mean[0] < mean[-1] else "RGB", mean, std)
    if len(mean) == 3 and max(abs(a - b) for a, b in zip(sorted(mean), CAFFE2["model.pixel_mean"])) < 1:
        return known
    return {key: value for key, value in known.items() if key != "model.input_format"}


def _refuse_halves(source: str, unused: Sequence[str]) -> None:
    """A network with further layers between those that are known is another network.

    Raises:
        CheckpointError: names such a layer.
    """
    other = [name for name in unused if re.match(r"layer\d|conv1|bn1|backbone\.|rpn\.head\.|roi_heads\.box_", name)]
    if other:
        raise CheckpointError(
            f"{source}: has layers that this network has no place for ({', '.join(other[:3])}, {len(other)} tensors); "
            "torchvision's *_fpn_v2 detectors and ResNets with attention or blur are not supported"
        )


def _starts(names: set[str], *beginnings: str) -> bool:
    return any(name.startswith(beginnings) for name in names)
