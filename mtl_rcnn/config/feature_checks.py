"""What must hold where features of the trunk are kept (`model.cache_features`)."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.config.part_names import TRUNK, is_pattern
from mtl_rcnn.config.trust import TARGET
from mtl_rcnn.errors import ConfigError


def check_features(cfg: DictConfig) -> None:
    """Refuses to keep features of a trunk that learns, or of images that look different each time they come.

    Args:
        cfg: a composed configuration; one that keeps no features passes.

    Raises:
        ConfigError: names the key, and the overrides to add.
    """
    where = OmegaConf.select(cfg, "model.cache_features")
    if where is None:
        return
    frozen = OmegaConf.select(cfg, "solver.freeze") or ()
    if not any(name == TRUNK or is_pattern(name) for name in frozen):  # the network judges patterns
        raise ConfigError(
            f"model.cache_features={where}: features are kept of a trunk that does not change; add "
            "solver.freeze=[trunk], or set model.cache_features=null"
        )
    entries = OmegaConf.select(cfg, "data.train_augment") or {}
    fixes = {name: fix for name, entry in entries.items() if (fix := _fix(entry)) is not None}
    if fixes:
        random = ", ".join(f"data.train_augment.{name}" for name in fixes)
        overrides = " ".join(f"data.train_augment.{name}{fix}" for name, fix in fixes.items())
        raise ConfigError(
            f"model.cache_features={where}: features are kept of one view of each image, and {random} "
            f"{'draws' if len(fixes) == 1 else 'draw'} another each time; add {overrides}, or set "
            "model.cache_features=null"
        )


def _fix(entry: DictConfig | None) -> str | None:
    """What to put behind an augmentation's key, lest it draws; None for one that gives an image one view, and for what
    is none."""
    name = str(entry.get(TARGET, "")).rpartition(".")[2] if isinstance(entry, DictConfig) else ""
    if not name or name == "Resize" or name.endswith("Transform"):
        return None
    if name == "ResizeShortestEdge":
        return _one_size(entry.get("short_edge_length"))
    return None if entry.get("prob") == 0 else "=null"


def _one_size(sizes: object) -> str | None:
    """Detectron2 takes a number or a list of them, and draws from the list, or between its ends."""
    if not OmegaConf.is_list(sizes) or len(set(sizes)) == 1:
        return None
    return f".short_edge_length={max(sizes)}"
