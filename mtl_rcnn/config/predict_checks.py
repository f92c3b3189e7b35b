"""What must hold of the settings of a prediction."""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn.errors import ConfigError

_CHOICES = {"format": ("coco", "jsonl", "csv"), "on_error": ("skip", "raise")}
_LEAST = {"batch_size": 1, "workers": 0}


def check_predict(cfg: DictConfig) -> None:
    """Refuses settings of `configs/predict.yaml` out of range; other configurations pass.

    Raises:
        ConfigError: names the key.
    """
    if "network" not in cfg or "input" not in cfg:
        return
    for key, choices in _CHOICES.items():
        if cfg[key] not in choices:
            raise ConfigError(f"{key}={cfg[key]}: expected {' or '.join(choices)}")
    for key, least in _LEAST.items():
        if not isinstance(cfg[key], int) or isinstance(cfg[key], bool) or cfg[key] < least:
            raise ConfigError(f"{key}={cfg[key]}: expected a whole number of at least {least}")
    if cfg.limit is not None and (not isinstance(cfg.limit, int) or cfg.limit < 1):
        raise ConfigError(f"limit={cfg.limit}: expected null or a whole number of at least 1")
