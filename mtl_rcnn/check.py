"""Reads the whole data of a training run before the run: `python -m mtl_rcnn.check experiment=...`."""

from mtl_rcnn.console import check

if __name__ == "__main__":
    check()
