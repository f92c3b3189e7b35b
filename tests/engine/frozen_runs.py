"""Short runs with frozen parts on the toy data set, for tests/engine/test_freeze.py and test_feature_cache.py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from tiny import tiny_config
from toy import Toy

from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.modeling.backbone import ResNetFPN

TASKS = ("detection", "semantic")
ONE_SIZE = (
    "data.train_augment.flip=null",
    "data.train_augment.resize=null",
    "+data.train_augment.size={_target_: detectron2.data.transforms.Resize, shape: [64, 96]}",
)
SEVERAL_SIZES = ("data.train_augment.flip=null",)


def frozen_config(toy: Toy, folder: Path, *overrides: str) -> DictConfig:
    """Six iterations, two epochs, on the toy images, two at a time; batch norm in the trunk."""
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    small = [
        *("solver.batch_size=2", "solver.max_iter=6", "solver.steps=[0.8]", "solver.warmup_iters=2"),
        *("solver.lr=0.005", "solver.log_period=1", "solver.eval_period=0", "solver.checkpoint_period=3"),
        *("solver.weight_decay=0.1", "solver.weight_decay_norm=null", "data.workers=0", "device=cpu", "threads=1"),
        *("report.enabled=false", "evaluation.samples=0", "data.val=[]"),
        *(f"data.{kind}_augment.resize.short_edge_length=48" for kind in ("train", "test")),
    ]
    return tiny_config(TASKS, f"data.train=[{data}]", f"output_dir={folder}", *small, *overrides)


def weights_of(folder: Path, iteration: int = 6) -> dict[str, torch.Tensor]:
    """The network that a run saved."""
    return checkpoints.load(folder / f"model_{iteration:07d}.pth")["model"]


@contextmanager
def counted_trunk() -> Iterator[list[int]]:
    """Inside, notes the length of every batch that goes through a trunk."""
    forward, seen = ResNetFPN.forward, []

    def counting(self: ResNetFPN, x: torch.Tensor) -> Any:
        seen.append(len(x))
        return forward(self, x)

    ResNetFPN.forward = counting
    try:
        yield seen
    finally:
        ResNetFPN.forward = forward
