"""Which tasks help each other: trains every task's own network, chosen subsets and all tasks together, and compares.

    python tools/compare_tasks.py experiment=shapes seeds=3
    python tools/compare_tasks.py experiment=shapes seeds=3 methods=[sum,uncertainty,pcgrad] output_dir=outputs/methods

Started again with the same output_dir, it goes on; started several times at once, the trainings are shared out.
"""

from mtl_rcnn.console import compare_tasks

if __name__ == "__main__":
    compare_tasks()
