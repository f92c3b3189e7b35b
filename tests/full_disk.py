"""A run of two ranks on a disk of 8 MB that fills up, gets more room, and at last is read-only.

unshare --mount --map-root-user python tests/full_disk.py FOLDER

Prints the three ends as JSON. The disk is a tmpfs in FOLDER, which goes with the namespace that `unshare` makes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from functools import partial
from pathlib import Path

from omegaconf import DictConfig
from ranks import start_forks
from runs import assert_equal_runs
from test_train import toy_config
from toy import write_toy

from mtl_rcnn.engine.checkpoint import Checkpointer
from mtl_rcnn.engine.train import train

OPTIONS = ("solver.max_iter=8", "solver.checkpoint_period=1", "checkpoint.keep=9", "data.val=[]")


def main(folder: Path) -> None:
    """Three starts of the same run."""
    toy = write_toy(folder / "toy")
    disk = folder / "disk"
    disk.mkdir()
    cfg = toy_config(toy, disk / "run", *OPTIONS, tasks=("detection",))
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", disk], check=True)
    full = _start(cfg, folder)
    left = Checkpointer(disk / "run", keep=1).resumable()
    subprocess.run(["mount", "-o", "remount,size=64m", disk], check=True)
    roomy = _start(cfg, folder)
    whole = toy_config(toy, folder / "whole", *OPTIONS, tasks=("detection",))
    assert _start(whole, folder)[0] == [0, 0]
    assert_equal_runs(folder / "whole", disk / "run")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    read_only = _start(cfg, folder)
    print(json.dumps({"full": full, "left": left.name, "with room": roomy, "read-only": read_only}))


def _start(cfg: DictConfig, folder: Path) -> tuple[list[int], str]:
    """Exit statuses of two ranks, and the last line that rank 0 printed."""
    ranks = start_forks(partial(train, cfg), 2, said=folder)
    for rank in ranks:
        rank.join(100)
    return [rank.exitcode for rank in ranks], (folder / "0.txt").read_text().splitlines()[-1]


if __name__ == "__main__":
    main(Path(sys.argv[1]))
