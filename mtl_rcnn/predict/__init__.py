"""Predictions on images, folders and videos: `from mtl_rcnn.predict import Predictor`."""

from mtl_rcnn.predict.predictor import Predictor, Skipped
from mtl_rcnn.predict.result import Result

__all__ = ["Predictor", "Result", "Skipped"]
