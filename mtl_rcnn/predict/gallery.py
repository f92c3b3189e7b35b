"""A picture to judge a run by: predictions beside the ground truth."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from mtl_rcnn.data.target import Prediction
from mtl_rcnn.engine.gallery import Showcase, gallery_tiles
from mtl_rcnn.predict.predictor import Predictor
from mtl_rcnn.visualize.gallery import contact_sheet, write_image


def write_gallery(path: Path, predictor: Predictor, number: int = 12, threshold: float = 0.5) -> None:
    """One picture: images of the first evaluation set, ground truth beside prediction.

    Args:
        path: of the PNG.
        number: images, spread over the set.
        threshold: least score that is drawn.
    """

    def predict(image: np.ndarray) -> Prediction:
        return predictor.confident(predictor.one(image), threshold)

    titles, pairs = zip(*gallery_tiles(Showcase(predict, predictor.cfg, predictor.label_space), number))
    write_image(path, contact_sheet(pairs, columns=2, titles=titles))
