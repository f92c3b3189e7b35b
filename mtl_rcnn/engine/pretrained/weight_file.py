"""Any file of weights, read safely: tensors by the names its author gave them."""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from detectron2.utils.file_io import PathManager
from torch import Tensor

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import model_file
from mtl_rcnn.engine.pretrained.safe_pickle import load_pickle
from mtl_rcnn.errors import CheckpointError

_NESTED = ("model", "state_dict", "model_state")
"""Keys under which training programs keep the state dict among other things."""
_TORCHVISION = "torchvision://"
_TIMM = "timm://"


Expectations = Mapping[str, Any]
"""{key of the configuration: the value the weights were trained with}"""


STRIDE = "model.backbone.stride_in_1x1"


def pixels(input_format: str, mean: tuple[float, ...], std: tuple[float, ...]) -> Expectations:
    """What a network expects of its input: the channels' order, and what is subtracted from them and divides them (of
    0..255)."""
    return {"model.input_format": input_format, "model.pixel_mean": mean, "model.pixel_std": std}


@dataclass(frozen=True)
class WeightFile:
    """The tensors of a file.

    Attributes:
        source: what the user named, for messages.
        tensors: by their names in the file.
        file_name: of the file that was read, "" if there was none.
        author: as Detectron2's model zoo names it, "" elsewhere.
        caffe2: the names are those of Caffe2's Detectron.
        partial_names: the names lack their beginning (`stem.conv1.weight`), as Detectron2's converted backbones do.
        expects: what the source is known to expect of the configuration.
        own: the whole checkpoint, or what `model_file.load` gives, if this project wrote it; else None.
    """

    source: str
    tensors: Mapping[str, Tensor]
    file_name: str = ""
    author: str = ""
    caffe2: bool = False
    partial_names: bool = False
    expects: Expectations = field(default_factory=dict)
    own: Mapping[str, Any] | None = field(default=None, repr=False)


def read_weight_file(source: str) -> WeightFile:
    """Reads weights and runs no code from them.

    Args:
        source: a path, a URL, `detectron2://` and a file of its model zoo, `torchvision://` and the name of a
            `WeightsEnum` member such as `MaskRCNN_ResNet50_FPN_Weights.COCO_V1`, or `timm://` and the name of a
            pretrained model. Downloads are kept in the libraries' caches. Files may be `.pkl` (Detectron2, Caffe2),
            `.safetensors`, or anything `torch.save` wrote.

    Raises:
        CheckpointError: no such file, a damaged one, one that would run code, or one without tensors.
    """
    if source.startswith(_TIMM):
        return _from_timm(source)
    path = _local_path(source)
    if path.suffix == ".pkl":
        return _from_pickle(source, path.name, load_pickle(path))
    if path.suffix == ".safetensors":
        return _from_safetensors(source, path)
    return _from_torch(source, path)


def _local_path(source: str) -> Path:
    if source.startswith(_TORCHVISION):
        source = _torchvision_url(source)
    if "://" not in source:
        path = Path(source)
        if not path.is_file():
            kind = "a directory, expected a file of weights" if path.is_dir() else "no such file"
            raise CheckpointError(f"checkpoint.weights={source}: {kind}")
        return path
    try:
        path = Path(PathManager.get_local_path(source))
    except Exception as error:  # of whatever library serves the scheme
        raise CheckpointError(f"checkpoint.weights={source}: cannot fetch it ({error})") from error
    if not path.is_file():
        raise CheckpointError(f"checkpoint.weights={source}: nothing here knows how to fetch it")
    return path


def _torchvision_url(source: str) -> str:
    from torchvision.models import get_weight

    try:
        return get_weight(source.removeprefix(_TORCHVISION)).url
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"checkpoint.weights={source}: torchvision has no such weights ({error})") from error


def _from_timm(source: str) -> WeightFile:
    try:
        model = timm.create_model(source.removeprefix(_TIMM), pretrained=True)
    except Exception as error:  # an unknown name, a model without weights, no network, ...
        text = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CheckpointError(f"checkpoint.weights={source}: timm cannot give these weights ({text})") from error
    mean, std = (tuple(255 * value for value in model.pretrained_cfg[key]) for key in ("mean", "std"))
    return WeightFile(source, model.state_dict(), expects=pixels("RGB", mean, std))


def _from_pickle(source: str, file_name: str, content: Any) -> WeightFile:
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source}: holds a {type(content).__name__}, expected arrays by name")
    if "model" in content and "__author__" in content:
        author = str(content["__author__"])
        partial = author == "Caffe2" or bool(content.get("matching_heuristics", False))
        tensors = _tensors(source, content["model"])
        return WeightFile(source, tensors, file_name, author, author == "Caffe2", partial)
    if isinstance(content.get("model"), Mapping):
        return WeightFile(source, _tensors(source, content["model"]), file_name)
    blobs = content.get("blobs", content)
    arrays = {name: value for name, value in blobs.items() if not str(name).endswith("_momentum")}
    return WeightFile(source, _tensors(source, arrays), file_name, caffe2=True, partial_names=True)


def _from_safetensors(source: str, path: Path) -> WeightFile:
    if model_file.describes_itself(path):
        return _own(source, path, model_file.load(path))
    return WeightFile(source, model_file.read_tensors(path), path.name)


def _from_torch(source: str, path: Path) -> WeightFile:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle or archive can fail in any way
        raise CheckpointError(_why_unreadable(source, path, error)) from error
    if isinstance(content, Mapping) and "format" in content and "model" in content:
        return _own(source, path, checkpoints.load(path))
    for key in _NESTED:
        if isinstance(content, Mapping) and isinstance(content.get(key), Mapping):
            content = content[key]
            break
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{source}: holds a {type(content).__name__}, expected a state dict (tensors by name)")
    return WeightFile(source, _without_wrapper(_tensors(source, content)), path.name)


def _own(source: str, path: Path, own: Mapping[str, Any]) -> WeightFile:
    return WeightFile(source, checkpoints.trained_weights(own), path.name, expects=_of_run(own["config"]), own=own)


def _of_run(config: Mapping[str, Any]) -> Expectations:
    """What a run of this project was trained with."""
    model = config["model"]
    known = pixels(model["input_format"], tuple(model["pixel_mean"]), tuple(model["pixel_std"]))
    stride = model["backbone"].get("stride_in_1x1")
    return known if stride is None else {**known, STRIDE: stride}


def _why_unreadable(source: str, path: Path, error: Exception) -> str:
    text = str(error)
    if "weights_only" in text and (zipfile.is_zipfile(path) or "global" in text.lower()):
        return (
            f"{source}: refused, it holds more than tensors and plain values, and reading that would run its code "
            f"({_foreign_name(text)}). Save its state dict alone: torch.save(model.state_dict(), file)"
        )
    return (
        f"{source} ({path.stat().st_size} bytes): not a readable file of weights, truncated or damaged "
        f"({text.splitlines()[0].rstrip('.') if text else type(error).__name__}); fetch it again"
    )


def _foreign_name(text: str) -> str:
    """The line of torch's long message that names what it would not load."""
    lines = [line.strip() for line in text.splitlines() if "GLOBAL" in line or "global" in line]
    return lines[0][:160] if lines else "torch names no part of it"


def _tensors(source: str, content: Any) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for name, value in content.items() if isinstance(content, Mapping) else ():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            value = torch.from_numpy(value.astype(value.dtype.newbyteorder("="), order="C"))
        if isinstance(value, Tensor):
            found[str(name)] = value
    if not found:
        raise CheckpointError(f"{source}: holds no tensors by name, expected a state dict")
    return found


def _without_wrapper(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Names without the `module.` that DistributedDataParallel puts before them."""
    if all(name.startswith("module.") for name in tensors):
        return {name.removeprefix("module."): value for name, value in tensors.items()}
    return tensors
