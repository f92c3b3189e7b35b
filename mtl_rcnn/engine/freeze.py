"""What does not learn: parameters without gradients, layers that keep their statistics, and features that are
computed once."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf
from torch import nn

from mtl_rcnn.engine.parameters import named_parameters
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.feature_cache import FeatureCache, FolderStore
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

IN_MEMORY = "ram"
_WITH_STATISTICS = nn.modules.batchnorm._NormBase


def freeze(model: MultiTaskRCNN, names: Sequence[str]) -> None:
    """Freezes what `solver.freeze` names, before the optimizer is built, which takes what has gradients alone.

    A normalisation layer of which nothing learns normalises with its running statistics and leaves them as they are. A
    trunk of which nothing learns is in evaluation mode as a whole: it draws nothing (dropout), and its features are a
    function of the image. Both hold whoever calls `train()` on what. The other layers of a frozen task go on as in
    training, since what lies below them may learn: they draw, and cuDNN's LSTM passes on gradients in training mode
    alone.

    Args:
        model: of any mode.
        names: of the trunk, of tasks, or patterns of parameter names, see `named_parameters`.

    Raises:
        ConfigError: a name that stands for no parameter.
    """
    for name in names:
        for parameter in named_parameters(model, name, "solver.freeze").values():
            parameter.requires_grad_(False)
    for module in _still(model) if names else ():
        module.eval()
        # On the module itself: `train()` of whatever holds it comes by here.
        module.train = partial(_stay, module)


def cache_features(cfg: DictConfig, model: MultiTaskRCNN) -> None:
    """Keeps the features of a frozen trunk as `model.cache_features` says, when its weights are those of the run.

    In a folder they lie under a digest of these weights, of the trunk's configuration and of the pixels' statistics.

    Raises:
        ConfigError: the trunk learns, or the folder cannot be made.
    """
    where = cfg.model.cache_features
    if where is None:
        return
    if not _is_frozen(model.backbone) or model.backbone.training:
        raise ConfigError(
            f"model.cache_features={where}: features are kept of a trunk that does not change; add "
            "solver.freeze=[trunk], or set model.cache_features=null"
        )
    view = _view(cfg, model)
    try:
        store = {} if where == IN_MEMORY else FolderStore(Path(where) / view.hex())
    except OSError as error:
        raise ConfigError(f"model.cache_features={where}: this folder cannot be made ({error})") from error
    model.cache = FeatureCache(model.backbone, view, store)


def _view(cfg: DictConfig, model: MultiTaskRCNN) -> bytes:
    """Digest of all that features follow from beside the pixels; not every setting of the trunk shows in its
    weights."""
    knobs = [OmegaConf.to_container(cfg.model.backbone, resolve=True), cfg.model.channels_last]
    statistics = {"pixel_mean": model.pixel_mean, "pixel_std": model.pixel_std}
    digest = hashlib.blake2b(json.dumps(knobs, sort_keys=True).encode(), digest_size=16)
    for name, tensor in {**statistics, **model.backbone.state_dict()}.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return digest.digest()


def _still(model: MultiTaskRCNN) -> Iterator[nn.Module]:
    """The trunk and normalisation layers, as far as nothing of them learns. A layer without parameters belongs to
    what holds it."""
    for module in model.modules():
        if _is_frozen(module):
            yield from (layer for layer in module.modules() if isinstance(layer, _WITH_STATISTICS))
    if _is_frozen(model.backbone):
        yield model.backbone


def _is_frozen(module: nn.Module) -> bool:
    parameters = list(module.parameters())
    return bool(parameters) and not any(parameter.requires_grad for parameter in parameters)


def _stay(module: nn.Module, mode: bool = True) -> nn.Module:
    """In place of `train`: evaluation mode, whatever `mode` says."""
    return nn.Module.train(module, False)
