"""A checkpoint of this project from somebody else's weights, to evaluate, export or predict with them untrained."""

from __future__ import annotations

import logging
from pathlib import Path

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.engine.run import setup_logging, versions
from mtl_rcnn.errors import ConfigError

_log = logging.getLogger(__name__)


def import_weights(cfg: DictConfig, ranks: Ranks) -> Path:
    """Writes `<output_dir>/imported.pth`: the network of a training configuration with the weights that its
    `checkpoint` names.

    The classes are those of the configuration's training data, whose annotation files must be there. Returns the file.

    Raises:
        ConfigError: no `checkpoint.weights`.
        CheckpointError: weights that cannot be read or do not fit.
    """
    if not cfg.checkpoint.weights:
        raise ConfigError("checkpoint.weights: name the file to import")
    setup_logging(None, ranks)
    _, label_space = train_datasets(cfg)
    model = build_model(cfg, label_space)
    load_initial_weights(cfg, model, label_space)
    state = dict.fromkeys(checkpoints.KEYS) | {
        "format": checkpoints.FORMAT,
        "iteration": 0,
        "model": model.state_dict(),
        "label_space": label_space.state(),
        "config": OmegaConf.to_container(cfg, resolve=True),
        "versions": versions(),
    }
    path = Path(cfg.output_dir) / "imported.pth"
    path.parent.mkdir(parents=True, exist_ok=True)
    if ranks.is_main:
        checkpoints.save(path, state)
    _log.info("wrote %s: evaluate, export and predict take it as run=%s", path, path)
    return path
