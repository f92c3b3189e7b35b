"""Writes a trained network's predictions as labels of the tasks that a data set lacks.

    python tools/pseudo_label.py network=outputs/demo output_dir=outputs/pseudo only_tasks=[mask] \
        'dataset={name: boxes, images: outputs/demo_data/train, annotations: boxes.json}'
"""

from mtl_rcnn.console import pseudo_label

if __name__ == "__main__":
    pseudo_label()
