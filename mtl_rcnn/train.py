"""`python -m mtl_rcnn.train` is tools/train_net.py, wherever the package is installed."""

from mtl_rcnn.console import train

if __name__ == "__main__":
    train()
