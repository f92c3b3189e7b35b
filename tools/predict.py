"""Runs an exported file or a checkpoint on images, folders and videos: drawings and results.

python tools/predict.py network=outputs/demo/model.ts input=outputs/demo_data/val
"""

from mtl_rcnn.console import predict

if __name__ == "__main__":
    predict()
