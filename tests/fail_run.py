"""Lets one of two training ranks fail in each way, and says how long both took to end and what they said.

python tests/fail_run.py     prints the table that docs/reliability.md shows

Both ranks train on the toy images. In the third iteration rank 1 does what is named in `FAULTS`. Processes are forked,
so that a start costs no imports.
"""

from __future__ import annotations

import multiprocessing
import os
import re
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig
from ranks import start_forks
from tabulate import tabulate
from test_train import toy_config
from toy import Toy, write_toy

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer

OPTIONS = ("data.val=[]", "solver.max_iter=1000", "solver.checkpoint_period=0", "data.workers=1")
TASKS = ("detection", "mask")
WHEN = 2
"""Iterations that are done when the fault comes."""
PATIENCE_S = 90


@dataclass(frozen=True)
class End:
    """How two ranks ended.

    Attributes:
        statuses: exit status of each.
        said: output and errors of each.
        seconds: from the fault until each had ended.
    """

    statuses: list[int]
    said: list[str]
    seconds: list[float]

    @property
    def errors(self) -> set[str]:
        """What was reported, without repetitions."""
        return set(re.findall(r"^(?:rank \d+ ends: )?(error on rank .*)$", "\n".join(self.said), re.MULTILINE))


def _raise_in_mask(trainer: Trainer, toy: Toy) -> None:
    def fail(*arguments: Any, **named: Any) -> None:
        raise ValueError("surprise")

    mask = trainer.network.roi_heads.tasks["mask"]
    next(module for module in mask.modules() if isinstance(module, torch.nn.Conv2d)).forward = fail


def _delete_image(trainer: Trainer, toy: Toy) -> None:
    (toy.images / "13.png").unlink()


def _kill_worker(trainer: Trainer, toy: Toy) -> None:
    (worker,) = multiprocessing.active_children()
    os.kill(worker.pid, signal.SIGKILL)


def _kill(trainer: Trainer, toy: Toy) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _stop(trainer: Trainer, toy: Toy) -> None:
    os.kill(os.getpid(), signal.SIGSTOP)


FAULTS: dict[str, Callable[[Trainer, Toy], None]] = {
    "an exception in a task's code": _raise_in_mask,
    "an image deleted while training": _delete_image,
    "a loader's worker killed": _kill_worker,
    "the rank killed": _kill,
    "the rank stopped": _stop,
}


def fail(folder: Path, fault: str, *options: str) -> End:
    """Two ranks train in `folder`; rank 1 fails."""
    toy = write_toy(folder / "toy")
    cfg = toy_config(toy, folder / "run", *OPTIONS, *options, tasks=TASKS)
    ranks = start_forks(partial(_train, cfg, toy, fault, folder / "moment"), 2, said=folder)
    ended: dict[int, float] = {}
    patience = time.monotonic() + PATIENCE_S
    while len(ended) < len(ranks) and time.monotonic() < patience:
        for number, rank in enumerate(ranks):
            if not rank.is_alive():
                ended.setdefault(number, time.monotonic())
        time.sleep(0.02)
    for rank in ranks:
        rank.kill()
        rank.join()
    moment = float((folder / "moment").read_text())
    return End(
        [rank.exitcode for rank in ranks],
        [(folder / f"{number}.txt").read_text() for number in range(len(ranks))],
        [ended.get(number, float("inf")) - moment for number in range(len(ranks))],
    )


def _train(cfg: DictConfig, toy: Toy, fault: str, moment: Path) -> None:
    backward = Trainer._backward

    def failing(self: Trainer, samples: list[Sample]) -> Any:
        if (self.ranks.rank, self.iter) == (1, WHEN):
            moment.write_text(str(time.monotonic()))
            FAULTS[fault](self, toy)
        return backward(self, samples)

    Trainer._backward = failing  # of this process, a fork
    train(cfg)


def main() -> None:
    """Prints a row per fault."""
    rows = []
    for fault in FAULTS:
        with tempfile.TemporaryDirectory() as folder:
            end = fail(Path(folder), fault)
        rows.append((fault, *(f"{seconds:.1f}" for seconds in end.seconds), *end.statuses, " / ".join(end.errors)))
    heads = ("fault", "rank 0 ended after, s", "rank 1, s", "status of 0", "of 1", "said")
    print(tabulate(rows, headers=heads, tablefmt="github"))


if __name__ == "__main__":
    main()
