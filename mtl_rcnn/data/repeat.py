"""How often an image is to come in an epoch: images of rare classes more often than others.

Repeat factor sampling (Gupta, Dollar and Girshick, LVIS: A Dataset for Large Vocabulary Instance Segmentation, 2019,
appendix B.2). With f(c) the fraction of training images that show class c, and t a threshold:
    r(c) = max(1, sqrt(t / f(c))),    r(i) = max of r(c) over the classes c of image i, 1 for an image without any.
An image comes r(i) times in an epoch, on average.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

import numpy as np

from mtl_rcnn.data.catalog import Dataset

_SHOWN = 8


def repeat_factors(datasets: Sequence[Dataset], thresh: float | None) -> np.ndarray:
    """(N,) float64 times that every image of all datasets, in their order, comes in an epoch on average.

    Args:
        datasets: f(c) is taken over all of their images together; a dataset's own `repeat` multiplies its factors.
        thresh: t above, a fraction of the images; None repeats no image for its classes.
    """
    own = np.repeat([float(dataset.repeat) for dataset in datasets], [len(dataset.records) for dataset in datasets])
    return own * np.concatenate(image_repeat_factors(datasets, thresh))


def image_repeat_factors(datasets: Sequence[Dataset], thresh: float | None) -> list[np.ndarray]:
    """r(i) of the images of each data set, (N_d,) float64: `repeat_factors` without the data sets' own."""
    factors = [np.ones(len(dataset.records)) for dataset in datasets]
    of_class = class_repeat_factors(datasets, thresh)
    for dataset, own in zip(datasets, factors if of_class else ()):
        images, indices = dataset.shown_classes.T
        np.maximum.at(own, images, [of_class[index] for index in indices.tolist()])
    return factors


def class_repeat_factors(datasets: Sequence[Dataset], thresh: float | None) -> dict[int, float]:
    """r(c) by class index, of the classes that occur in the datasets together; none without a threshold."""
    if thresh is None:
        return {}
    total = sum(len(dataset.records) for dataset in datasets)
    images = Counter(index for dataset in datasets for index in dataset.shown_classes[:, 1].tolist())
    return {index: max(1.0, (thresh * total / number) ** 0.5) for index, number in images.items()}


def repeat_report(datasets: Sequence[Dataset], thresh: float | None, classes: Sequence[str]) -> str:
    """How long an epoch is and whose images are repeated, in a few lines; "" if every image comes once."""
    factors = repeat_factors(datasets, thresh)
    if (factors == 1).all():
        return ""
    ends = np.cumsum([len(dataset.records) for dataset in datasets])
    parts = np.split(factors, ends[:-1])
    lines = [
        f"{dataset.name}: {len(part)} images, {part.sum():.1f} samples an epoch on average, "
        f"each image {part.min():.2f} to {part.max():.2f} times"
        for dataset, part in zip(datasets, parts)
    ]
    if thresh is not None:
        rare = {index: r for index, r in class_repeat_factors(datasets, thresh).items() if r > 1}
        shown = sorted(rare, key=lambda index: -rare[index])[:_SHOWN]
        named = ", ".join(f"{classes[index]} {rare[index]:.2f}" for index in shown)
        lines.append(f"{len(rare)} classes are on less than {thresh:g} of all images" + (f": {named}" if named else ""))
        lines[-1] += " ..." if len(rare) > _SHOWN else ""
    return "\n".join(lines)
