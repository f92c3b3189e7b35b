"""Says what a training run will need, before it is queued: memory, time per epoch, hours on n nodes, disk.

python tools/plan.py experiment=shapes nodes=[1] gpus_per_node=1
"""

from mtl_rcnn.console import plan

if __name__ == "__main__":
    plan()
