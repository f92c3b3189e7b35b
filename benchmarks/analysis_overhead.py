"""What looking at the tasks' gradients and costs (`analysis.every`) adds to a training step.

    python benchmarks/analysis_overhead.py experiment=shapes data.root=datasets/shape_scenes --every 50 --threads 2

Two networks with the same weights train on the same few batches, which are read once; one of them is analysed every
so many steps. In a turn, in which one look falls, they make as many steps each, one after the other. The median of the
turns' ratios is told with the smallest and the largest; besides it the ratio of the one step with the look, which a
busy machine disturbs less: one in `every` steps costs as much.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from balancing_overhead import ALONE, make_trainer, side_by_side
from tabulate import tabulate

from mtl_rcnn import config
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.trainer import Trainer


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="of the training configuration: experiment=shapes ...")
    parser.add_argument("--every", type=int, default=50, help="steps between two looks, and of a turn")
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--batches", type=int, default=2, help="different batches")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        plain, analysed = build(arguments.overrides, arguments.batches, Path(folder))
        row = measure(plain, analysed, arguments.every, arguments.turns)
    print(tabulate([row], headers="keys", floatfmt=".3f", tablefmt="github"))
    if arguments.out:
        arguments.out.write_text(json.dumps(row, indent=2), encoding="utf-8")


def build(overrides: Sequence[str], number: int, folder: Path) -> tuple[Trainer, Trainer]:
    """Two trainers of one network on the same batches."""
    cfg = config.compose("train", list(overrides))
    datasets, label_space = train_datasets(cfg)
    samples = list(islice(train_loader(cfg, datasets, build_targets(cfg, label_space), 0, ALONE), number))
    return make_trainer(cfg, label_space, samples, folder), make_trainer(cfg, label_space, samples, folder)


def measure(plain: Trainer, analysed: Trainer, every: int, turns: int) -> dict[str, Any]:
    """A row of the table.

    Args:
        every: steps of a turn; the analysed network is looked at in the last.
    """
    analysed.analyse_every = 1
    side_by_side(plain, analysed, 2)  # warms up
    found: dict[str, list[float]] = {"turn": [], "look": [], "plain": []}
    for number in range(turns):
        print(f"turn {number + 1} of {turns}", file=sys.stderr, flush=True)
        plain.analyse_every = analysed.analyse_every = 0
        before, others = side_by_side(plain, analysed, every - 1)
        analysed.analyse_every = 1
        last, look = side_by_side(plain, analysed, 1)
        found["turn"].append((others + look) / (before + last))
        found["look"].append(look / last)
        found["plain"].append((before + last) / every)
    look = statistics.median(found["look"])
    return {
        "every": every,
        "time over plain": statistics.median(found["turn"]),
        "smallest": min(found["turn"]),
        "largest": max(found["turn"]),
        "step with the look": look,
        "which is, every so many": 1 + (look - 1) / every,
        "seconds of a plain step": statistics.median(found["plain"]),
    }


if __name__ == "__main__":
    main()
