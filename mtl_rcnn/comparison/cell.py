"""A training of a comparison, as a process of its own: `python -m mtl_rcnn.comparison.cell --config-dir=... ...`."""

from mtl_rcnn.console import train

if __name__ == "__main__":
    train()
