"""Why a metric is next to nothing, as far as the network shows it: a score threshold above all scores, parts that
were neither loaded nor trained. What rows and ground truth show is in `evaluation.diagnosis`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from omegaconf import DictConfig
from torch import Tensor

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.data import build_mapper
from mtl_rcnn.evaluation.diagnosis import LOW
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric
from mtl_rcnn.evaluation.inference import evaluation_mode
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

_IMAGES = 8
"""Looked at for the highest score."""


def explained(
    metrics: Mapping[str, Metric],
    evaluator: Evaluator,
    network: MultiTaskRCNN,
    cfg: DictConfig,
    label_space: LabelSpace,
) -> dict[str, Metric]:
    """The metrics, with more reason where the task's headline metric is next to nothing.

    Args:
        metrics: of one task on one dataset, by name.
        evaluator: that made them.
        network: that was evaluated; left as it is.
        cfg: it was built from.
    """
    headline = metrics.get(evaluator.headline)
    if headline is None or not headline.higher_is_better or headline.value >= 100 * LOW:
        return dict(metrics)
    evidence = [
        text for text in (_scores(headline, evaluator, network, cfg), untrained(network, cfg, label_space)) if text
    ]
    if not evidence:
        return dict(metrics)
    reason = "; ".join([*([headline.reason] if headline.reason else []), *evidence])
    return {
        name: replace(metric, reason=reason) if metric.reason == headline.reason and "/" not in name else metric
        for name, metric in metrics.items()
    }


def untrained(network: MultiTaskRCNN, cfg: DictConfig, label_space: LabelSpace) -> str | None:
    """Names the parts all of whose weights are those of the run's random start; None if there is none.

    The start is a pure function of the seed, so that being equal to it is evidence. Weight decay shrinks also what no
    gradient moves: a common factor does not count as a difference. Constants (zero biases, norms) are no evidence.
    """
    start = {name: dict(part.named_parameters()) for name, part in build_model(cfg, label_space).parts().items()}
    found = []
    for name, part in network.parts().items():
        random = {key: value for key, value in start[name].items() if value.numel() > 1 and value.std() > 0}
        now = dict(part.named_parameters())
        if random and all(_is_multiple(now[key].detach().cpu(), value.detach()) for key, value in random.items()):
            found.append(f"'{name}' (all {len(random)} weights)")
    if not found:
        return None
    return f"still as at the random start, neither loaded nor trained: {', '.join(found)}"


def _is_multiple(weight: Tensor, start: Tensor) -> bool:
    """Whether one is the other times a number, within a relative 1e-4."""
    now, then = weight.double().flatten(), start.double().flatten()
    rest = now - then * (now @ then / (then @ then))
    return bool(rest.norm() <= 1e-4 * now.norm())


def highest_score(network: MultiTaskRCNN, records: Sequence[Record], cfg: DictConfig) -> float | None:
    """The highest score of any detection in these images, whatever the score threshold; None without one."""
    mapper = build_mapper(cfg, {}, training=False)
    best = []
    with evaluation_mode(network), _without_threshold(network):
        for index, record in enumerate(records):
            (prediction,) = network.predict([mapper(record, index)])
            best += prediction["scores"].tolist()
    return max(best, default=None)


def _scores(headline: Metric, evaluator: Evaluator, network: MultiTaskRCNN, cfg: DictConfig) -> str | None:
    """What the score threshold has to do with there being no detections."""
    if network.roi_heads is None or headline.reason is None or not headline.reason.startswith("no detections"):
        return None
    detector, records = network.roi_heads.detector, evaluator.records[:_IMAGES]
    best = highest_score(network, records, cfg)
    seen = "without it there are none either" if best is None else f"the highest score is {best:.3f}"
    return f"the score threshold is {detector.score_thresh:g}, {seen} ({len(records)} images looked at)"


@contextmanager
def _without_threshold(network: MultiTaskRCNN) -> Iterator[None]:
    detector = network.roi_heads.detector
    before, detector.score_thresh = detector.score_thresh, 0.0
    try:
        yield
    finally:
        detector.score_thresh = before
