"""Reads the whole data of a training run, lists every fault, and tries the first steps.

    python tools/check_data.py experiment=demo
    python tools/check_data.py experiment=demo fix_dir=outputs/repaired

Ends with status 1 if there is any fault.
"""

from mtl_rcnn.console import check

if __name__ == "__main__":
    check()
