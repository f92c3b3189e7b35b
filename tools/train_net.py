"""Trains, evaluates and checkpoints one run.

    python tools/train_net.py experiment=shapes
    python tools/train_net.py experiment=shapes tasks=[detection,mask] solver.max_iter=100
    torchrun --nproc-per-node 2 tools/train_net.py experiment=shapes

Started again with the same output_dir, it goes on where it was stopped.
"""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn import config


@config.main("train")
def main(cfg: DictConfig) -> None:
    """Reads `configs/train.yaml` with the command line's overrides."""
    from mtl_rcnn.engine.train import train  # after composition: a typo is told without waiting for torch

    train(cfg)


if __name__ == "__main__":
    main()
