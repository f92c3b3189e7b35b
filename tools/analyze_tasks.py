"""Which tasks' gradients agree or conflict on the shared features, with tables and figures, and what each task costs.

python tools/analyze_tasks.py run=outputs/shapes batches=50
torchrun --nproc-per-node 2 tools/analyze_tasks.py run=outputs/shapes
"""

from mtl_rcnn.console import analyze_tasks

if __name__ == "__main__":
    analyze_tasks()
