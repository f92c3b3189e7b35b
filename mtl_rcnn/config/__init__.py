"""Composition and checks of a run's configuration. Nothing here imports torch, so that a mistake shows at once."""

from mtl_rcnn.config.compose import compose, config_root
from mtl_rcnn.config.entry import main
from mtl_rcnn.config.plain import load, save, to_plain

__all__ = ["compose", "config_root", "load", "main", "save", "to_plain"]
