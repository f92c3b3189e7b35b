"""One rank of a run under torchrun; rank 1 is killed in its fourth iteration, once.

python -m torch.distributed.run --standalone --nproc-per-node=2 --max-restarts=1 tests/restart_worker.py CONFIG
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.train import train
from mtl_rcnn.engine.trainer import Trainer


def main(config: str) -> None:
    """Trains."""
    backward, killed = Trainer._backward, Path(config).with_name("killed")

    def dying(self: Trainer, samples: list[Sample]) -> Any:
        if (self.ranks.rank, self.iter) == (1, 3) and not killed.exists():
            killed.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return backward(self, samples)

    Trainer._backward = dying
    train(OmegaConf.load(config))


if __name__ == "__main__":
    main(sys.argv[1])
