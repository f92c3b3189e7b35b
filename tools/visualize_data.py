"""Draws what the loader really feeds the network, per task.

python tools/visualize_data.py experiment=demo number=8
"""

from mtl_rcnn.console import visualize_data

if __name__ == "__main__":
    visualize_data()
