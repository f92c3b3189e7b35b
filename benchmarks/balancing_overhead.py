"""What a training step costs under each balancing method, over what it costs under the plain sum.

    python benchmarks/balancing_overhead.py experiment=shapes data.root=datasets/shape_scenes --threads 2

Every method trains a network of its own, from the same weights, on the same few batches, which are read once. In a turn
a method and the plain sum make ten steps each, one after the other, so that what disturbs the machine for longer than a
step disturbs both; the median of the turns' ratios is told with the smallest and the largest. Ten steps, since FAMO
looks at a batch a second time in one of ten.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate

from mtl_rcnn import config
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.trainer import PRECISIONS, Trainer

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
STEPS = 10
METHODS = sorted(path.stem for path in (Path(__file__).parents[1] / "configs" / "balancing").glob("*.yaml"))


def main() -> None:
    """Measures and prints a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="+", help="of the training configuration: experiment=shapes ...")
    parser.add_argument("--methods", nargs="+", default=METHODS, choices=METHODS)
    parser.add_argument("--at", choices=("features", "parameters"), help="where methods on gradients compare them")
    parser.add_argument("--turns", type=int, default=3, help="of ten steps of each method")
    parser.add_argument("--batches", type=int, default=2, help="different batches")
    parser.add_argument("--threads", type=int, default=2, help="of torch")
    parser.add_argument("--out", type=Path, help="JSON file to write")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainers = build(
            arguments.overrides, ["sum", *arguments.methods], arguments.batches, Path(folder), arguments.at
        )
        rows = measure(trainers[0][1], dict(trainers[1:]), arguments.turns)
    print(tabulate(rows, headers="keys", floatfmt=".2f", tablefmt="github"))
    if arguments.out:
        arguments.out.write_text(json.dumps(rows, indent=2), encoding="utf-8")


def build(
    overrides: Sequence[str], methods: Sequence[str], number: int, folder: Path, at: str | None = None
) -> list[tuple[str, Trainer]]:
    """A trainer for each of `methods`."""
    found: list[tuple[str, Trainer]] = []
    samples: list[list[Sample]] = []
    for method in methods:
        cfg = config.compose("train", [*overrides, f"balancing={method}", "balancing.weights=null"])
        if at is not None and "at" in cfg.balancing:
            cfg.balancing.at = at
        datasets, label_space = train_datasets(cfg)
        if not samples:
            samples = list(islice(train_loader(cfg, datasets, build_targets(cfg, label_space), 0, ALONE), number))
        found.append((method, make_trainer(cfg, label_space, samples, folder)))
    return found


def make_trainer(cfg: DictConfig, label_space: Any, batches: list[list[Sample]], folder: Path) -> Trainer:
    """A trainer at a rate so low that losses stay what they are: no method is to train on easier samples."""
    model = build_model(cfg, label_space)
    model.to(memory_format=torch.channels_last if cfg.model.channels_last else torch.contiguous_format).train()
    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ALONE, cfg.solver)
    return Trainer(
        model,
        balancer,
        build_optimizer(model, cfg.solver),
        LrSchedule(lr=1e-6, max_iter=10**6),
        cycle(batches),
        ALONE,
        PRECISIONS[cfg.solver.precision],
        cfg.solver.clip_gradients,
        Stopwatch(cfg.solver.batch_size, 10**6, ALONE.device),
        (folder, OmegaConf.to_container(cfg, resolve=True), label_space),
    )


def measure(plain: Trainer, trainers: dict[str, Trainer], turns: int) -> list[dict[str, Any]]:
    """A row per method, whose trainer takes turns with that of the plain sum."""
    for trainer in (plain, *trainers.values()):
        turn(trainer, 2)  # warms up
    ratios: dict[str, list[float]] = {method: [] for method in trainers}
    seconds: list[float] = []
    for number in range(turns):
        for method, trainer in trainers.items():
            print(f"turn {number + 1} of {turns}: {method}", file=sys.stderr, flush=True)
            ours, theirs = side_by_side(plain, trainer, STEPS)
            seconds.append(ours)
            ratios[method].append(theirs / ours)
    step = statistics.median(seconds) / STEPS
    return [
        {
            "balancing": method,
            "time over the plain sum": statistics.median(values),
            "smallest": min(values),
            "largest": max(values),
            "seconds of a step of the sum": step,
        }
        for method, values in ratios.items()
    ]


def side_by_side(first: Trainer, second: Trainer, steps: int) -> tuple[float, float]:
    """Seconds that two trainers take for so many steps each, one step after the other."""
    pairs = [(turn(first, 1), turn(second, 1)) for _ in range(steps)]
    return sum(one for one, _ in pairs), sum(other for _, other in pairs)


def turn(trainer: Trainer, steps: int) -> float:
    """Seconds of some steps."""
    started = time.perf_counter()
    for _ in range(steps):
        trainer.iter = getattr(trainer, "iter", -1) + 1
        trainer.run_step()
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
