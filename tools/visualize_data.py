"""Draws what the loader really feeds the network, per task.

python tools/visualize_data.py experiment=demo number=8
"""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn import config


@config.main("visualize_data")
def main(cfg: DictConfig) -> None:
    """Reads `configs/visualize_data.yaml` with the command line's overrides."""
    from mtl_rcnn.engine.gallery import visualize_data

    visualize_data(cfg)


if __name__ == "__main__":
    main()
