"""One rank of a training run that notes which samples it trains on, and may be told to stop on the way.

python resume_worker.py <config.yaml> <folder for the notes> <rank> <iteration>: that rank alone gets SIGUSR1 in the
step after so many; -1: none does.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer


def main(config: str, notes: str, told: str, when: str) -> None:
    """Trains with `Trainer` changed as said above."""
    backward = Trainer._backward

    def noting(self: Trainer, samples: list[Sample]) -> Any:
        rank = self.ranks.rank
        with open(Path(notes) / "seen.jsonl", "a") as file:  # short lines, which no other rank can tear
            file.write(json.dumps([self.iter, rank, [sample["sample_index"] for sample in samples]]) + "\n")
        if (rank, self.iter) == (int(told), int(when)):
            os.kill(os.getpid(), signal.SIGUSR1)
        return backward(self, samples)

    Trainer._backward = noting
    train(OmegaConf.load(config))


if __name__ == "__main__":
    main(*sys.argv[1:])
