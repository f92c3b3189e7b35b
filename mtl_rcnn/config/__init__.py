"""Configuration: composition by Hydra, checks before anything heavy is imported, and which code a configuration
may name.

Nothing here imports torch.
"""

from mtl_rcnn.config.compose import compose, config_root
from mtl_rcnn.config.entry import main

__all__ = ["compose", "config_root", "main"]
