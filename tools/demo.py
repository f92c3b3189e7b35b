"""The main job end to end on generated scenes: data, training, evaluation, export, prediction. `make demo` runs it.

Leaves outputs/demo/ with configuration, checkpoints, metrics.json, model.ts, manifest.json, runtime.py and gallery.png.
"""

from __future__ import annotations

import sys
from pathlib import Path

from mtl_rcnn import config


def main(overrides: list[str]) -> None:
    """Runs every step; `overrides` go to the training configuration."""
    cfg = config.compose("train", ["experiment=demo", *overrides])
    from mtl_rcnn.data.shape_scenes import write_shape_scenes
    from mtl_rcnn.engine.train import train
    from mtl_rcnn.export.export import export_checkpoint
    from mtl_rcnn.predict import Predictor
    from mtl_rcnn.predict.gallery import write_gallery

    write_shape_scenes(Path(cfg.data.root), train=1500, val=100, seed=0)
    folder = train(cfg).folder
    export_checkpoint(config.compose("export", [f"run={folder}"]))
    write_gallery(folder / "gallery.png", Predictor(folder / "model.ts"))
    print(f"the demo is complete: look at {folder / 'gallery.png'} and {folder / 'metrics.json'}")


if __name__ == "__main__":
    main(sys.argv[1:])
