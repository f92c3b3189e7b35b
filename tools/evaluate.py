"""Scores a checkpoint, or results files, with COCO metrics: metrics.json, and predictions/ as standard COCO JSON.

python tools/evaluate.py run=outputs/demo
torchrun --nproc-per-node 2 tools/evaluate.py run=outputs/demo
"""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn import config


@config.main("evaluate")
def main(cfg: DictConfig) -> None:
    """Reads `configs/evaluate.yaml` with the command line's overrides."""
    from mtl_rcnn.engine.evaluate import evaluate_checkpoint

    evaluate_checkpoint(cfg)


if __name__ == "__main__":
    main()
