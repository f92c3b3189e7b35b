"""Scores a checkpoint, or results files, with COCO metrics: metrics.json, and predictions/ as standard COCO JSON.

python tools/evaluate.py run=outputs/demo
torchrun --nproc-per-node 2 tools/evaluate.py run=outputs/demo
"""

from mtl_rcnn.console import evaluate

if __name__ == "__main__":
    evaluate()
