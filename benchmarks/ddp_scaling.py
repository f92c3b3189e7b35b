"""How training scales over the processes of one machine, and what a step spends on communication.

    python benchmarks/ddp_scaling.py --ranks 1 2 4 --batch 2 --iterations 40 --turns 3
    python benchmarks/ddp_scaling.py experiment=shapes data.root=datasets/shape_scenes model.backbone.width=64

`Trainer` under DDP (gloo, CPU), one thread and one core per process; data is generated unless `data.root` is given.
Weak scaling: each process has `--batch` images. Strong scaling: all together have as many as the largest number of
processes has in weak scaling. Efficiency is time with one process over time with n, in strong scaling over n times it;
processes that share caches and memory compute more slowly than one alone, which the column "computing" shows.

Four loops of the same network take turns, one step each on the same batch (read once: reading does not count), each
after a barrier: this project's and Detectron2's `SimpleTrainer`, and each of them once more without DDP and without any
collective. The rate is so low that all weights stay equal. Of a step, which lasts until the last rank is done,

- computing is what a silent step takes, the mean of the ranks;
- waiting is for the slowest rank: with its time in place of the mean, taken apart before and after the reduction of the
  losses, for which all ranks meet (Detectron2's loop has none);
- communicating is what a step takes beyond that: the losses' reduction (Detectron2: gathering the losses on rank 0),
  copying gradients into DDP's buckets and back, summing them, and the broadcast of batch norm's buffers, which
  Detectron2 leaves out. What hides behind computing is not in it.

With one process the last two are 0 but for the noise of measuring. Each is the median over the steps, then over the
turns, so that they add up only nearly; in each turn all processes are started anew. Where the configuration clips
gradients, both loops do: this one that of the whole network, Detectron2's, as it does, that of each parameter.

Beside them stands what summing the gradients alone takes, in buckets of DDP's size, and what tools/plan.py reckons for
it with links measured as docs/plan.md says: a large all-reduce for the bandwidth, a small one for the latency.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import random
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from itertools import cycle, islice, pairwise
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from detectron2.config import CfgNode
from detectron2.engine import SimpleTrainer
from detectron2.engine.defaults import create_ddp_model
from detectron2.solver.build import maybe_add_gradient_clipping
from detectron2.utils.events import EventStorage
from omegaconf import DictConfig, OmegaConf
from tabulate import tabulate
from torch import Tensor, nn

from mtl_rcnn import config
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.shape_scenes import write_shape_scenes
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.distributed import Ranks, barrier, distributed, gather_objects
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.forecast import BUCKET_BYTES, Links, all_reduce_seconds
from mtl_rcnn.engine.schedule import LrSchedule, build_optimizer
from mtl_rcnn.engine.stopwatch import Stopwatch
from mtl_rcnn.engine.train import distribute
from mtl_rcnn.engine.trainer import PRECISIONS, Trainer
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

Step = Callable[[int], None]
Run = tuple[int, int]
"""Processes, images of each."""

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
LR = 1e-12
BATCHES = 4
"""Different batches of each process."""
WARM_UP = 2
LARGE = 64 * 2**20
"""Bytes of the all-reduce that tells the bandwidth."""
OURS, PEER = "mtl-rcnn", "Detectron2's loop"


def main() -> None:
    """Measures and prints two tables."""
    arguments = parse()
    if arguments.rank_with:
        be_rank(arguments.overrides, arguments.rank_with, arguments.iterations)
        return
    ranks = sorted(set(arguments.ranks))
    scalings = {kind: runs_of(kind, ranks, arguments.batch) for kind in arguments.scaling}
    with tempfile.TemporaryDirectory() as folder:
        if not any(override.startswith("data.root=") for override in arguments.overrides):
            write_shape_scenes(Path(folder, "scenes"), BATCHES * arguments.batch * ranks[-1], 1, progress=False)
            arguments.overrides.append(f"data.root={folder}/scenes")
        check(arguments.overrides)
        found = measure(sorted({run for runs in scalings.values() for run in runs}), arguments)
    print(conditions(arguments, found))
    print(table([row for kind, runs in scalings.items() for row in scaling_rows(kind, runs, found)]))
    print()
    print(table([row for run in sorted(found) for row in part_rows(run, found[run])]))
    if arguments.json:
        turns = [{"processes": run[0], "images of each": run[1], "turns": found[run]} for run in sorted(found)]
        arguments.json.write_text(json.dumps(turns, indent=2), encoding="utf-8")


def parse() -> argparse.Namespace:
    """The command line; `overrides` complete but for the data."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", help="of the training configuration; default experiment=shapes")
    parser.add_argument("--ranks", nargs="+", type=int, default=[1, 2, 4], help="numbers of processes")
    parser.add_argument("--scaling", nargs="+", choices=("weak", "strong"), default=["weak", "strong"])
    parser.add_argument("--batch", type=int, default=2, help="images of each process in weak scaling")
    parser.add_argument("--iterations", type=int, default=40, help="steps of each loop in a turn")
    parser.add_argument("--turns", type=int, default=3, help="starts of every number of processes")
    parser.add_argument("--model", help="of configs/model, in place of the experiment's")
    parser.add_argument("--json", type=Path, help="file to write")
    parser.add_argument("--rank-with", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    arguments.overrides = arguments.overrides or ["experiment=shapes"]
    if arguments.model:
        arguments.overrides.append(f"model={arguments.model}")
    return arguments


def runs_of(kind: str, ranks: Sequence[int], batch: int) -> list[Run]:
    """What is run for "weak" or "strong" scaling; `ranks` ascends."""
    if kind == "weak":
        return [(number, batch) for number in ranks]
    whole = batch * ranks[-1]
    if any(whole % number for number in ranks):
        raise SystemExit(f"strong scaling: {whole} images (--batch times {ranks[-1]}) must divide by each of {ranks}")
    return [(number, whole // number) for number in ranks]


def check(overrides: Sequence[str]) -> None:
    """Stops where the loops would not do the same."""
    solver = config.compose("train", overrides).solver
    if solver.precision != "float32" or solver.accumulate != 1:
        raise SystemExit("Detectron2's loop computes in float32, whole batches: leave precision and accumulate alone")


def conditions(arguments: argparse.Namespace, found: dict[Run, list[Any]]) -> str:
    """What a reader of the tables should know."""
    cores, most = len(os.sched_getaffinity(0)), max(run[0] for run in found)
    gradients = next(iter(found.values()))[0]["gradient_bytes"]
    shared = "" if most <= cores else f" FEWER THAN {most}: processes shared cores, and the figures say little."
    chosen = " ".join(override for override in arguments.overrides if not override.startswith("data.root="))
    return (
        f"{chosen}, gradients of {gradients / 1e6:.1f} MB, "
        f"{arguments.turns} x {arguments.iterations} steps, torch {torch.__version__}, gloo, {cores} cores.{shared}\n"
    )


def measure(runs: Sequence[Run], arguments: argparse.Namespace) -> dict[Run, list[Any]]:
    """What rank 0 told in each turn of each run."""
    found: dict[Run, list[Any]] = {run: [] for run in runs}
    for turn in range(arguments.turns):
        for run in runs:
            found[run].append(start(run, arguments.overrides, arguments.iterations))
            step = found[run][-1][OURS]["step"]
            told = f"turn {turn + 1} of {arguments.turns}: {run[0]} x {run[1]} images, {step:.3f} s a step"
            print(told, file=sys.stderr, flush=True)
    return found


def start(run: Run, overrides: Sequence[str], iterations: int) -> dict[str, Any]:
    """Starts the processes of a run; returns what rank 0 tells. RuntimeError if one of them fails."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(run[0]), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-W", "ignore", __file__, *overrides]
    command += ["--rank-with", str(run[1]), "--iterations", str(iterations)]
    processes = [
        subprocess.Popen(
            command,
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.DEVNULL if rank else subprocess.PIPE,
            text=True,
        )
        for rank in range(run[0])
    ]
    try:
        told = processes[0].communicate()[0].splitlines()
        statuses = [process.wait(timeout=60) for process in processes]
    finally:
        for process in processes:
            process.kill()
    if any(statuses):
        raise RuntimeError(f"{run[0]} processes with {run[1]} images each ended with status {statuses}")
    return json.loads(told[-1])


# One rank


def be_rank(overrides: Sequence[str], share: int, iterations: int) -> None:
    """Takes part in a run with `share` images per step; rank 0 prints what was found."""
    torch.set_num_threads(1)
    with distributed("cpu") as ranks, fail_together(ranks):
        pin(ranks)
        cfg = config.compose("train", [*overrides, "data.workers=0", f"solver.batch_size={share * ranks.world}"])
        found = take_turns(cfg, ranks, iterations)
        if ranks.is_main:
            print(json.dumps(found), flush=True)


def pin(ranks: Ranks) -> None:
    """Keeps this process to a core of its own, if there are enough."""
    cores = sorted(os.sched_getaffinity(0))
    if ranks.world <= len(cores):
        os.sched_setaffinity(0, {cores[ranks.rank]})


def take_turns(cfg: DictConfig, ranks: Ranks, iterations: int) -> dict[str, Any]:
    """Seconds of each loop's step, of its parts and of the reductions alone; the same on every rank."""
    datasets, label_space = train_datasets(cfg)
    samples = train_loader(cfg, datasets, build_targets(cfg, label_space), 0, ranks)
    batches = list(islice(samples, BATCHES))
    model = build_model(cfg, label_space)
    model = model.to(memory_format=torch.channels_last if cfg.model.channels_last else torch.contiguous_format)
    size = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder, EventStorage():
        steps = {
            (OURS, False): ours(cfg, label_space, copy.deepcopy(model), batches, ranks, Path(folder)),
            (OURS, True): ours(cfg, label_space, copy.deepcopy(model), batches, ranks, Path(folder), silent=True),
            (PEER, False): peer(cfg, copy.deepcopy(model), batches),
            (PEER, True): peer(cfg, copy.deepcopy(model), batches, silent=True),
        }
        seconds = timed(steps, iterations)
    found: dict[str, Any] = {name: parts(seconds[name, False], seconds[name, True]) for name in (OURS, PEER)}
    mine, theirs = (map(_last, seconds[name, False]) for name in (OURS, PEER))
    ratio = statistics.median(other / own for own, other in zip(mine, theirs))
    return {**found, "ratio": ratio, "gradient_bytes": size, **reductions(size, ranks)}


def ours(
    cfg: DictConfig,
    label_space: LabelSpace,
    model: MultiTaskRCNN,
    batches: list[list[Sample]],
    ranks: Ranks,
    folder: Path,
    silent: bool = False,
) -> Step:
    """The step of `Trainer` as training makes it; silent: of a network without DDP."""
    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ALONE if silent else ranks, cfg.solver)
    trainer = Trainer(
        model.train() if silent else distribute(model, ranks),
        balancer,
        build_optimizer(model, cfg.solver),
        LrSchedule(lr=LR, max_iter=10**6),
        cycle(batches),
        ranks,
        PRECISIONS[cfg.solver.precision],
        cfg.solver.clip_gradients,
        Stopwatch(cfg.solver.batch_size, 10**6, ranks.device),
        (folder, OmegaConf.to_container(cfg, resolve=True), label_space),
        draws=cfg.seed if cfg.model.sampling == "keyed" else None,
    )

    def step(iteration: int) -> None:
        trainer.iter = iteration
        trainer.run_step()

    return step


def peer(cfg: DictConfig, model: MultiTaskRCNN, batches: list[list[Sample]], silent: bool = False) -> Step:
    """The step of Detectron2's `SimpleTrainer`, under DDP as its `DefaultTrainer` asks for; silent: without."""
    optimizer = build_optimizer(model, cfg.solver)
    for group in optimizer.param_groups:
        group["lr"] = LR
    limit = cfg.solver.clip_gradients
    clip = {"ENABLED": limit is not None, "CLIP_TYPE": "norm", "CLIP_VALUE": limit, "NORM_TYPE": 2.0}
    optimizer = maybe_add_gradient_clipping(CfgNode({"SOLVER": {"CLIP_GRADIENTS": clip}}), optimizer)
    network = LossMeans(model)
    network = network if silent else create_ddp_model(network, broadcast_buffers=False, device_ids=None)
    trainer = SimpleTrainer(network, cycle(batches), optimizer)
    return lambda iteration: trainer.run_step()


class LossMeans(nn.Module):
    """A network as Detectron2's loop wants it: each rank divides its losses by its own counts."""

    def __init__(self, network: MultiTaskRCNN) -> None:
        super().__init__()
        self.network = network

    def forward(self, samples: list[Sample]) -> dict[str, Tensor]:
        """{"task/part": () mean}."""
        sums, _ = self.network(samples)
        return {name: total / count.clamp(min=1) for name, (total, count) in sums.items()}


def timed(steps: dict[tuple[str, bool], Step], iterations: int) -> dict[tuple[str, bool], list[list[list[float]]]]:
    """(loop, silent) -> for each iteration and rank the seconds until each place where a silent rank would have met the
    others, and until the end of the step.

    The order in which the loops follow each other is drawn anew for each iteration, the same on every rank.
    """
    own: dict[tuple[str, bool], list[list[float]]] = {key: [] for key in steps}
    for iteration in range(-WARM_UP, iterations):
        for key in random.Random(iteration).sample(list(steps), len(steps)):
            barrier()
            with silence() if key[1] else nullcontext([]) as met:
                begin = time.perf_counter()
                steps[key](iteration + WARM_UP)
                seconds = [moment - begin for moment in (*met, time.perf_counter())]
            if iteration >= 0:
                own[key].append(seconds)
    everybody = gather_objects(own)
    return {key: [list(ranks) for ranks in zip(*(one[key] for one in everybody))] for key in steps}


@contextmanager
def silence() -> Iterator[list[float]]:
    """Each rank keeps its losses to itself. Yields the moments at which it would have met the others."""
    met: list[float] = []

    def alone(tensor: Tensor) -> Tensor:
        met.append(time.perf_counter())
        return tensor.detach().clone()

    with (
        mock.patch("mtl_rcnn.engine.losses.all_reduce_sum", alone),
        mock.patch("detectron2.utils.comm.gather", lambda value, **_: [value]),
    ):
        yield met


def parts(loud: list[list[list[float]]], silent: list[list[list[float]]]) -> dict[str, float]:
    """Median seconds of a step and of what it consists of; arguments as `timed` returns them."""
    steps = list(map(_last, loud))
    computing = [statistics.mean(rank[-1] for rank in ranks) for ranks in silent]
    together = list(map(_together, silent))
    found = {
        "step": steps,
        "computing": computing,
        "waiting": [slowest - mean for slowest, mean in zip(together, computing)],
        "communicating": [step - slowest for step, slowest in zip(steps, together)],
    }
    return {name: statistics.median(seconds) for name, seconds in found.items()}


def _last(ranks: list[list[float]]) -> float:
    """Seconds until the last rank is done."""
    return max(rank[-1] for rank in ranks)


def _together(ranks: list[list[float]]) -> float:
    """The same if they had waited for each other wherever they meet, and lost no other time by it."""
    phases = [[end - begin for begin, end in pairwise([0.0, *rank])] for rank in ranks]
    return sum(map(max, zip(*phases)))


def reductions(size: int, ranks: Ranks) -> dict[str, float]:
    """Seconds of summing `size` bytes of gradients over the ranks: measured, and as tools/plan.py reckons."""
    if ranks.world == 1:
        return {"all_reduce": 0.0, "planned": 0.0}
    large, small = _all_reduce([LARGE]), _all_reduce([8])
    bandwidth = 2 * (ranks.world - 1) / ranks.world * LARGE / large
    links = Links(bandwidth, bandwidth, small / (2 * (ranks.world - 1)))
    whole, rest = divmod(size, BUCKET_BYTES)
    return {
        "all_reduce": _all_reduce([BUCKET_BYTES] * whole + [rest] * (rest > 0)),
        "planned": all_reduce_seconds(size, 1, ranks.world, links),
    }


def _all_reduce(sizes: Sequence[int], repeats: int = 10) -> float:
    """Median seconds of summing so many bytes after each other, until the last rank has them."""
    tensors = [torch.zeros(size // 4) for size in sizes]
    own = []
    for _ in range(-WARM_UP, repeats):
        barrier()
        begin = time.perf_counter()
        for tensor in tensors:
            dist.all_reduce(tensor)
        own.append(time.perf_counter() - begin)
    return statistics.median(map(max, zip(*gather_objects(own[WARM_UP:]))))


# Tables


def table(rows: list[dict[str, Any]]) -> str:
    """Markdown, numbers as they were written."""
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def scaling_rows(kind: str, runs: Sequence[Run], found: dict[Run, list[Any]]) -> list[dict[str, Any]]:
    """Rows of the first table; speed-up is against the fewest processes, per process of these."""
    rows = []
    speeds = [{name: _speeds(run, found[run], name) for name in (OURS, PEER)} for run in runs]
    for run, speed in zip(runs, speeds):
        gained = {name: statistics.median(speed[name]) / statistics.median(speeds[0][name]) for name in speed}
        more = run[0] / runs[0][0]
        rows.append(
            {
                "scaling": kind,
                "processes": run[0],
                "images of each": run[1],
                "images/s": f"{statistics.median(speed[OURS]):.2f}",
                "turns from, to": f"{min(speed[OURS]):.2f} to {max(speed[OURS]):.2f}",
                "speed-up": f"{gained[OURS]:.2f}",
                "efficiency": f"{gained[OURS] / more:.0%}",
                f"{PEER}, images/s": f"{statistics.median(speed[PEER]):.2f}",
                "its efficiency": f"{gained[PEER] / more:.0%}",
                "its time, ours = 1": f"{statistics.median(turn['ratio'] for turn in found[run]):.2f}",
            }
        )
    return rows


def _speeds(run: Run, turns: Sequence[Any], name: str) -> list[float]:
    """Images per second of all ranks, in each turn."""
    return [run[0] * run[1] / turn[name]["step"] for turn in turns]


def part_rows(run: Run, turns: Sequence[Any]) -> list[dict[str, Any]]:
    """Rows of the second table, one of each loop, in milliseconds and shares of the step."""
    rows = []
    for name in (OURS, PEER):
        medians = {part: statistics.median(turn[name][part] for turn in turns) for part in turns[0][name]}
        step = medians["step"]
        rows.append(
            {
                "processes x images": f"{run[0]} x {run[1]}",
                "loop": name,
                "step, ms": f"{1000 * step:.0f}",
                **{
                    f"{part}, ms": f"{1000 * medians[part]:.0f} ({medians[part] / step:.1%})"
                    for part in ("computing", "waiting", "communicating")
                },
                "gradients alone, ms": f"{1000 * statistics.median(turn['all_reduce'] for turn in turns):.0f}",
                "tools/plan.py, ms": f"{1000 * statistics.median(turn['planned'] for turn in turns):.0f}",
            }
        )
    return rows


if __name__ == "__main__":
    main()
