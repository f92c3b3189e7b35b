"""Runs an exported file or a checkpoint on images and folders: drawings and COCO results.

python tools/predict.py network=outputs/demo/model.ts input=outputs/demo_data/val
"""

from __future__ import annotations

from omegaconf import DictConfig

from mtl_rcnn import config


@config.main("predict")
def main(cfg: DictConfig) -> None:
    """Reads `configs/predict.yaml` with the command line's overrides."""
    from mtl_rcnn.engine.predict import predict_images

    predict_images(cfg)


if __name__ == "__main__":
    main()
