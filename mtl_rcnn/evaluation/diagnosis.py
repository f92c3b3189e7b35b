"""Why an AP is next to nothing, as far as rows and ground truth show it. What only the network can show is in
`engine.diagnosis`."""

from __future__ import annotations

from collections.abc import Sequence

from mtl_rcnn.evaluation.coco_scores import CocoScores, coco_scores
from mtl_rcnn.evaluation.confusion import confusion
from mtl_rcnn.evaluation.matching import CocoProblem

LOW = 0.01
"""An AP (0..1) below this is explained."""

_MUCH_HIGHER = 5.0


def low_reason(problem: CocoProblem, scores: CocoScores, class_names: Sequence[str]) -> str | None:
    """Why the AP is below `LOW`; None if it is not, or if nothing is found that explains it."""
    if scores.stats["AP"] < 0:
        return _no_truth(problem)
    if scores.stats["AP"] >= LOW:
        return None
    if not problem.rows:
        return f"no detections in {len(problem.truth['images'])} images"
    wrong_classes = _wrong_classes(problem, scores, class_names)
    if wrong_classes is not None or scores.stats["AP50"] > 0:
        return wrong_classes
    seen = len({row["image_id"] for row in problem.rows})
    best = max(row["score"] for row in problem.rows)
    return (
        f"{len(problem.rows)} detections in {seen} of {len(problem.truth['images'])} images (best score {best:.3f}), "
        "none matches at IoU 0.50"
    )


def _no_truth(problem: CocoProblem) -> str:
    images, regions = len(problem.truth["images"]), len(problem.truth["annotations"])
    return f"no ground truth in {images} images ({regions} crowd or unlabelled regions): nothing to score against"


def _wrong_classes(problem: CocoProblem, scores: CocoScores, class_names: Sequence[str]) -> str | None:
    """A message if the regions are right and the classes are not."""
    one = problem.without_classes()
    ignoring = coco_scores(one.truth, one.rows, one.iou_type, one.sigmas).stats["AP50"]
    if ignoring < max(0.1, _MUCH_HIGHER * scores.stats["AP50"]):
        return None
    mistakes = confusion(problem, class_names, {}).mistaken()
    return (
        f"right places, wrong classes: AP50 is {100 * scores.stats['AP50']:.1f}, but {100 * ignoring:.1f} when classes "
        f"are ignored; {', '.join(mistakes)}. Are the classes (category ids) of the detections those of the dataset?"
    )
