r"""Makes a checkpoint of weights from Detectron2, torchvision or timm, to evaluate, export or predict with them.

python tools/import_weights.py experiment=coco_box_mask_keypoint checkpoint.weights=model_final.pkl \
    +checkpoint.graft.keypoint=keypoint_rcnn.pkl output_dir=outputs/imported
"""

from mtl_rcnn.console import import_weights

if __name__ == "__main__":
    import_weights()
