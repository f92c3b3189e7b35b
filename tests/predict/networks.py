"""Trained networks for tests of prediction: random weights, in a checkpoint as a run leaves it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from omegaconf import OmegaConf
from PIL import Image
from reference import randomise_statistics
from tiny import LABEL_SPACE, tiny_config

from mtl_rcnn.engine import checkpoint
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.restore import Restored, restore

SIZES = ((48, 64), (64, 40), (50, 70), (36, 60), (44, 44))
"""Height and width of the images."""

RESIZE = ["data.test_augment.resize.short_edge_length=56", "data.test_augment.resize.max_size=80"]


def write_checkpoint(path: Path, tasks: Sequence[str], *overrides: str) -> Path:
    """A checkpoint of a tiny network that finds many things in any image."""
    found = ["tasks.detection.score_thresh=0.3"] if "detection" in tasks else []
    cfg = tiny_config(tasks, *RESIZE, *found, *overrides)
    model = build_model(cfg, LABEL_SPACE)
    randomise_statistics(model, seed=7)
    state = dict.fromkeys(checkpoint.KEYS)
    state |= {"format": checkpoint.FORMAT, "iteration": 0, "model": model.state_dict(), "versions": {}}
    state |= {"label_space": LABEL_SPACE.state(), "config": OmegaConf.to_container(cfg, resolve=True)}
    checkpoint.save(path, state)
    return path


def restored(folder: Path, tasks: Sequence[str], *overrides: str) -> Restored:
    """The network of such a checkpoint."""
    return restore(write_checkpoint(folder / "network.pth", tasks, *overrides))


def images() -> list[np.ndarray]:
    """(H, W, 3) uint8 RGB noise of five sizes."""
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (*size, 3), dtype=np.uint8) for size in SIZES]


def write_images(folder: Path) -> list[Path]:
    """The same as PNG files, in order of name."""
    folder.mkdir(parents=True)
    paths = [folder / f"{index}.png" for index in range(len(SIZES))]
    for path, image in zip(paths, images(), strict=True):
        Image.fromarray(image).save(path)
    return paths
