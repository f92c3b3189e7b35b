"""What the networks of a comparison cost when they are used: parameters, and time per image side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from mtl_rcnn.engine.data import build_mapper, val_datasets
from mtl_rcnn.engine.restore import Restored, restore

_IMAGES = 8
_TURNS = 12


@dataclass(frozen=True)
class Cost:
    """Of one network: number of parameters, and median milliseconds per image in batches of one."""

    parameters: int
    inference_ms: float


def measure_costs(folders: Mapping[str, Path], device: torch.device, turns: int = _TURNS) -> dict[str, Cost]:
    """Parameters and inference time of some runs' networks, which take turns on the same images: a machine that is
    busy slows all of them.

    Args:
        folders: name -> run, all with the same first evaluation set.
    """
    networks = {name: restore(folder, device) for name, folder in folders.items()}
    images = _images(next(iter(networks.values())))
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    for turn in range(-2, turns):  # the first two warm up
        for name, restored in networks.items():
            taken = _seconds(restored, images[turn % len(images)], device)
            if turn >= 0:
                seconds[name].append(taken)
    return {
        name: Cost(
            sum(parameter.numel() for parameter in restored.model.parameters()),
            1000 * statistics.median(seconds[name]),
        )
        for name, restored in networks.items()
    }


def _seconds(restored: Restored, image: tuple[Tensor, Tensor], device: torch.device) -> float:
    begin = time.perf_counter()
    restored.model.predict_tensors([image[0]], [image[1]])
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begin


def _images(restored: Restored) -> Sequence[tuple[Tensor, Tensor]]:
    """Of the first evaluation set, as in evaluation, with their original sizes."""
    records = val_datasets(restored.cfg, restored.label_space)[0].records
    mapper = build_mapper(restored.cfg, {}, training=False)
    samples = [mapper(record, index) for index, record in enumerate(records[:_IMAGES])]
    return [(sample["image"], torch.tensor([sample["height"], sample["width"]])) for sample in samples]
