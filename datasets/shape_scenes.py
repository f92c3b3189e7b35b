"""Generate the Shape Scenes data set: python datasets/shape_scenes.py --out DIR (see datasets/README.md)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # a clone works without being installed

from mtl_rcnn.data.shape_scenes import main, sample_scene, write_shape_scenes

__all__ = ["main", "sample_scene", "write_shape_scenes"]

if __name__ == "__main__":
    sys.exit(main())
