"""Trains, evaluates and checkpoints one run.

    python tools/train_net.py experiment=shapes
    python tools/train_net.py experiment=shapes tasks=[detection,mask] ~tasks.keypoint solver.max_iter=100
    torchrun --nproc-per-node 2 tools/train_net.py experiment=shapes

Started again with the same output_dir, it goes on where it was stopped.
"""

from mtl_rcnn.console import train

if __name__ == "__main__":
    train()
