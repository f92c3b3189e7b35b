"""Weights from elsewhere: Detectron2, Caffe2, torchvision and timm files under this project's names."""
