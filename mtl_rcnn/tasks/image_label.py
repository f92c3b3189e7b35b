"""Image labels: which of C labels hold for the whole image, each a yes or no of its own, or one per part.

The head is linear on the mean of the features (as ResNet's, arXiv 1512.03385), computed as the mean over the image of
a map of logits (class activation maps, arXiv 1512.04150, section 2): the two are the same, and the map lets the mean
leave out what is only padding. A hidden layer, where there is one, works at each place before the mean.

Of a vocabulary whose labels have parts, a task may take one (`part`): for it the labels of other parts do not exist,
and what it predicts bears its own name, so that one network has room for a task per part.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.data.dataset_spec import suggest
from mtl_rcnn.data.faults import Fault, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, ImageTarget, Prediction, Record, Sample, WrittenLabel
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row
from mtl_rcnn.evaluation.multilabel import UNKNOWN, Decisions, multilabel_metrics
from mtl_rcnn.modeling.slots import DecodedView, ImageTask, LossParts, Output, full_precision
from mtl_rcnn.visualize.canvas import Canvas

VOCABULARY = "image_labels"
"""Vocabulary of the labels, entries {name, part}; and the field of an image's entry that lists the names that hold."""

SIGMOID, SOFTMAX = MODES = ("sigmoid", "softmax_per_part")


class ImageLabelTarget(ImageTarget):
    """The names in an image's `image_labels`. An image without the field is not labelled; of a labelled one, every name
    of the data set's own vocabulary that is not listed does not hold, and names of other data sets are unknown.

    Args:
        part: of the vocabulary; None for all labels. Names of other parts count for nothing, and an image is labelled
            only where its data set's vocabulary has labels of this part.
        shown: labels of a part that a drawing names at most.
    """

    def __init__(self, name: str, label_space: LabelSpace, *, part: str | None = None, shown: int = 5) -> None:
        super().__init__(name, label_space)
        vocabulary = label_space.vocabulary(VOCABULARY, name)
        self.part = part
        self.indices = indices_of(part, vocabulary, name)
        self.entries = [vocabulary[index] for index in self.indices]
        self.names = [entry["name"] for entry in self.entries]
        self.every_name = [entry["name"] for entry in vocabulary]
        self.output = output_name(name, part)
        self.shown = shown

    def check(self, record: Record) -> Coverage:
        """Whether the image is labelled. DataError: labels of a wrong form, or a name the data set does not have."""
        for fault in self.faults(record):
            refuse(fault)
        return Coverage(image=self._labels(record))

    def faults(self, record: Record) -> Iterator[Fault]:
        """Labels of a wrong form, and names that the data set's vocabulary lacks."""
        if not self._labels(record):
            return
        given, known = record[VOCABULARY], self._known(record)
        if not isinstance(given, list | tuple) or not all(isinstance(name, str) for name in given):
            yield self._fault(record, "malformed labels", f"is {given!r}; expected a list of names, such as ['red']")
        elif not known:
            text = f"names {given}, but the data set has no vocabulary '{VOCABULARY}'; list the names it uses there"
            yield self._fault(record, "no vocabulary", text)
        else:
            for name in given:
                if name not in known:
                    hint = suggest(name, known) or f"; known: {', '.join(known)}"
                    text = f"names {name!r}, which the data set's vocabulary '{VOCABULARY}' lacks{hint}"
                    yield self._fault(record, "unknown label", text)

    def load(self, record: Record, geometry: Geometry) -> Tensor | None:
        """(C,) int64: 1 holds, 0 does not, -1 unknown."""
        if not self._labels(record):
            return None
        label = torch.full((len(self.every_name),), UNKNOWN)
        known = self._known(record)
        label[list(known.values())] = 0
        label[[known[name] for name in record[VOCABULARY]]] = 1
        return label[self.indices]

    def label_counts(self, record: Record) -> dict[str, int]:
        """1 for every label that holds, 0 for those that do not."""
        if not self._labels(record):
            return {}
        return {name: int(name in record[VOCABULARY]) for name in self._known(record) if name in self.names}

    def as_prediction(self, sample: Sample) -> Prediction:
        """Scores (C,): 1 where a label holds, else 0, also where that is not known."""
        label = sample["targets"].get(self.name)
        if label is None:
            return {self.output: torch.zeros(len(self.names))}
        return {self.output: (label == 1).float()}

    def cannot_label(self) -> str | None:
        """One part of the labels alone cannot be written: of a labelled image they are all known."""
        if self.part is None:
            return super().cannot_label()
        return (
            f"knows the part '{self.part}' alone, and an image whose '{VOCABULARY}' name labels of one part says that "
            "none of the others holds; a task with part: null knows them all"
        )

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel | None:
        """The names of at least this probability, if all others are as unlikely (at most 1 - `threshold`): a labelled
        image cannot leave one name open, so that one doubtful name leaves the image without labels."""
        if self.part is not None:
            return super().as_label(record, prediction, threshold)
        scores = prediction[self.output].tolist()
        given = {name: scores[index] for name, index in self._known(record).items()}
        if not given or any(1 - threshold < score < threshold for score in given.values()):
            return None
        return WrittenLabel(image={VOCABULARY: [name for name, score in given.items() if score >= threshold]})

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """Labels of at least 50 %, or the best one, the surest first; where labels have parts, a line per part."""
        scores = prediction[self.output].tolist()
        lines: dict[str | None, list[int]] = {}
        for index, entry in enumerate(self.entries):
            lines.setdefault(entry.get("part"), []).append(index)
        for part, indices in lines.items():
            order = sorted(indices, key=lambda index: -scores[index])
            shown = [index for index in order if scores[index] >= 0.5] or order[:1]
            words = [_worded(self.names[index], scores[index]) for index in shown[: self.shown] if scores[index] > 0]
            if part is not None and words:
                canvas.caption(f"{part}: {', '.join(words)}")
                continue
            for word in words:
                canvas.caption(word)

    def _labels(self, record: Record) -> bool:
        if self.declared(record) is False or record.get(VOCABULARY) is None:
            return False
        known = self._known(record)
        return not known or any(name in known for name in self.names)

    def _known(self, record: Record) -> dict[str, int]:
        """The labels that the record's data set knows, of any part: name -> index in the vocabulary."""
        indices = record["vocabularies"].get(VOCABULARY, {}).values()
        return {self.every_name[index]: index for index in indices}

    def _fault(self, record: Record, kind: str, text: str) -> Fault:
        place = f"dataset '{record['dataset']}', image {record['image_id']} ({record['file_name']}): '{VOCABULARY}'"
        return Fault(kind, f"{place} {text}", image_id=record["image_id"], field=VOCABULARY)


def _worded(name: str, score: float) -> str:
    return name if score == 1 else f"{name} {100 * score:.0f} %"


class ImageLabelEvaluator(Evaluator):
    """Accuracy, exact match, AP and F1 over the labels, in percent (see `multilabel_metrics`).

    Args:
        part: of the task.
        mode: of the task. Under softmax_per_part the best label of each part holds, however low its score.
        threshold: under sigmoid, a label holds from this score on.
    """

    headline = "exact_match"

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        records: Sequence[Record],
        *,
        part: str | None = None,
        mode: str = SIGMOID,
        threshold: float = 0.5,
    ) -> None:
        super().__init__(name, label_space, records)
        self.target = ImageLabelTarget(name, label_space, part=part)
        self.parts = parts_of(self.target.entries, name) if check_mode(mode, name) == SOFTMAX else []
        self.threshold = threshold

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """One row per image: {"image_id", "label_scores": {label: score}}."""
        scores = prediction[self.target.output].tolist()
        return [{"image_id": record["image_id"], "label_scores": dict(zip(self.target.names, scores, strict=True))}]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Of the labelled images; one without a row has score 0 for every label, and none of them holds."""
        given = {row["image_id"]: self._scores(row) for row in rows}
        identity = Geometry.identity(1, 1)
        truths = [(r["image_id"], label) for r in self.records if (label := self.target.load(r, identity)) is not None]
        if not truths or not given:
            reason = "no image of the data set is labelled" if not truths else "no predictions"
            return {name: Metric(0.0, reason=reason) for name in ("exact_match", "binary_accuracy", "mAP")}
        seen = np.array([image_id in given for image_id, _ in truths])
        nothing = np.zeros(len(self.target.names))
        scores = np.stack([given.get(image_id, nothing) for image_id, _ in truths])
        truth = np.stack([label.numpy() for _, label in truths])
        decisions = Decisions(scores, self._chosen(scores) & seen[:, None], truth)
        metrics = multilabel_metrics(decisions, self.target.names)
        if seen.all():
            return metrics
        reason = f"{(~seen).sum()} of {len(seen)} labelled images have no prediction, which counts as no label"
        return {name: replace(metric, reason=metric.reason or reason) for name, metric in metrics.items()}

    def _chosen(self, scores: np.ndarray) -> np.ndarray:
        """(N, C) bool of (N, C) scores."""
        if not self.parts:
            return scores >= self.threshold
        chosen = np.zeros(scores.shape, dtype=bool)
        for part in self.parts:
            chosen[np.arange(len(scores)), np.asarray(part)[scores[:, part].argmax(axis=1)]] = True
        return chosen

    def _scores(self, row: Row) -> np.ndarray:
        scores = row.get("label_scores")
        if not isinstance(scores, Mapping) or not set(self.target.names) <= set(scores):
            raise DataError(
                f"image_id {row['image_id']!r}: expected 'label_scores' with a number for each of "
                f"{', '.join(self.target.names)}, got {str(scores)[:80]}"
            )
        return np.array([scores[name] for name in self.target.names], dtype=np.float64)


class ImageLabelTask(ImageTask):
    """C logits of the mean over the image of features of the trunk.

    Args:
        part: of the vocabulary; None for all labels. With a part, output and manifest bear the task's name.
        mode: "sigmoid", or "softmax_per_part": of the labels of each part of the vocabulary exactly one holds.
        levels: of the trunk, averaged to the grid of the one with the largest stride and concatenated. Those that are
            left out get no gradient from this task.
        hidden: channels of a 1x1 convolution with ReLU before the logits; 0 for none.
        dropout: probability before each layer, of whole channels at once.
    """

    target_class = ImageLabelTarget
    evaluator_class = ImageLabelEvaluator
    loss_parts = ("cross_entropy",)

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        *,
        part: str | None = None,
        mode: str,
        levels: Sequence[str],
        hidden: int,
        dropout: float,
    ) -> None:
        super().__init__(name, label_space, features)
        vocabulary = label_space.vocabulary(VOCABULARY, name)
        self.entries = [dict(vocabulary[index]) for index in indices_of(part, vocabulary, name)]
        self.output = output_name(name, part)
        self.manifest_key = VOCABULARY if part is None else f"{name}_{VOCABULARY}"
        _check_levels(levels, features, name)
        self.levels = list(levels)
        self.stride = max(int(features[level].stride) for level in levels)
        self.ratios = [self.stride // int(features[level].stride) for level in levels]
        self.head = _layers(sum(features[level].channels for level in levels), hidden, len(self.entries), dropout)
        self.exclusive = check_mode(mode, name) == SOFTMAX
        parts = parts_of(self.entries, name) if self.exclusive else [list(range(len(self.entries)))]
        part_of = torch.tensor([[index in part for part in parts] for index in range(len(self.entries))])
        self.register_buffer("part_of", part_of, persistent=False)  # (C, P) bool

    def outputs(self) -> list[Output]:
        """Probabilities."""
        meaning = f"probability in 0..1 of each of the L labels, in the order of the manifest's `{self.manifest_key}`"
        return [Output(self.output, "(L,)", "float32", meaning)]

    def manifest(self) -> dict[str, Any]:
        """Names and parts of the labels."""
        return {self.manifest_key: self.entries}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(B, C, h, w) logits on the grid of the coarsest chosen level."""
        maps: list[Tensor] = []
        for level, ratio in zip(self.levels, self.ratios):
            maps.append(F.avg_pool2d(features[level], ratio, ceil_mode=True) if ratio > 1 else features[level])
        return self.head(torch.cat(maps, dim=1))

    def losses(self, raw: Tensor, targets: list[Tensor], image_sizes: Sequence[tuple[int, int]]) -> LossParts:
        """`cross_entropy`: summed over images and their known labels, counted by image.

        Under sigmoid binary, per label. Under softmax_per_part -log of the probability, per part, that one of the
        labels holds that may: those that do, or where none is known to, those that are unknown. A part of which
        every label is known not to hold trains nothing.
        """
        sizes = torch.tensor(image_sizes, device=raw.device).reshape(-1, 2)
        logits = mean_over_image(full_precision(raw), sizes, self.stride)
        truth = torch.stack([*targets, torch.zeros(logits.shape[1], dtype=torch.int64)])[:-1].to(raw.device)
        loss = self._per_part(logits, truth) if self.exclusive else _per_label(logits, truth)
        return {"cross_entropy": (loss, torch.tensor(float(len(targets)), device=raw.device))}

    @torch.jit.export
    def decode(self, raw: Tensor, padded_size: Tensor) -> dict[str, Tensor]:
        """label_maps (B, C, h, w): the logits, padding included."""
        return {"label_maps": raw.float()}

    @torch.jit.export
    def to_image(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """Scores (C,) in 0..1."""
        logits = mean_over_image(decoded["label_maps"][None], network_size[None], self.stride)
        scores = logits.sigmoid()
        if self.exclusive:
            scores = self.log_softmax(logits).exp()
        return {self.output: scores[0]}

    def merge_views(self, views: list[DecodedView], image_size: Tensor) -> dict[str, Tensor]:
        """Mean of the probabilities."""
        seen = [self.to_image(view.decoded, view.network_size, image_size)[self.output] for view in views]
        return {self.output: torch.stack(seen).mean(dim=0)}

    def log_softmax(self, logits: Tensor) -> Tensor:
        """(B, C) logits -> (B, C) logarithms of probabilities that sum to 1 over the labels of each part."""
        totals = logits[:, :, None].masked_fill(~self.part_of, float("-inf")).logsumexp(dim=1)
        # No matrix product: autocast would make it one of half precision.
        return logits - torch.where(self.part_of, totals[:, None, :], torch.zeros_like(totals[:1, None, :])).sum(dim=2)

    def _per_part(self, logits: Tensor, truth: Tensor) -> Tensor:
        holds, unknown = ((truth == value)[:, :, None] & self.part_of for value in (1, UNKNOWN))
        possible = torch.where(holds.any(dim=1, keepdim=True), holds, unknown)  # (B, C, P)
        trained = possible.any(dim=1)
        scores = self.log_softmax(logits)[:, :, None].expand(possible.shape).transpose(1, 2)[trained]
        return -scores.masked_fill(~possible.transpose(1, 2)[trained], float("-inf")).logsumexp(dim=1).sum()


@torch.jit.script_if_tracing
def mean_over_image(maps: Tensor, sizes: Tensor, stride: int) -> Tensor:
    """(B, C) means of maps (B, C, h, w) over the part of each that shows its image; cells at the border count by the
    share of them that does.

    Args:
        maps: in float32 or float64.
        sizes: (B, 2) int64 height and width of the images without padding, in pixels.
        stride: pixels per cell.
    """
    weights: list[Tensor] = []
    for side in range(2):
        first = torch.arange(maps.shape[2 + side], device=maps.device, dtype=maps.dtype)
        share = (sizes[:, side : side + 1].to(maps) / stride - first[None]).clamp(min=0.0, max=1.0)
        weights.append(share / share.sum(dim=1, keepdim=True))
    return (maps * weights[0][:, None, :, None] * weights[1][:, None, None, :]).sum(dim=[2, 3])


def output_name(task: str, part: str | None) -> str:
    """Of the prediction. Several tasks of one network take a part each: theirs differ."""
    return "label_scores" if part is None else f"{task}_scores"


def indices_of(part: str | None, vocabulary: Sequence[Mapping[str, Any]], task: str) -> list[int]:
    """Which entries of the vocabulary are of a part; all of them for None.

    Raises:
        ConfigError: no entry is of this part.
    """
    if part is None:
        return list(range(len(vocabulary)))
    found = [index for index, entry in enumerate(vocabulary) if entry.get("part") == part]
    if found:
        return found
    parts = list(dict.fromkeys(str(entry["part"]) for entry in vocabulary if entry.get("part")))
    if not parts:
        raise ConfigError(
            f"tasks.{task}.part={part}: no entry of the vocabulary '{VOCABULARY}' says its part; give every entry one, "
            "such as {name: red, part: colour}, or choose part=null"
        )
    raise ConfigError(
        f"tasks.{task}.part={part}: the vocabulary '{VOCABULARY}' has no such part{suggest(part, parts)}; parts are "
        f"{', '.join(parts)}"
    )


def parts_of(entries: Sequence[Mapping[str, Any]], task: str) -> list[list[int]]:
    """Indices of the labels of each part, parts in order of their first label.

    Raises:
        ConfigError: an entry without a part.
    """
    parts: dict[str, list[int]] = {}
    for index, entry in enumerate(entries):
        if not entry.get("part"):
            raise ConfigError(
                f"tasks.{task}.mode={SOFTMAX}: {VOCABULARY} {entry['name']!r} says no 'part'; give every entry one, "
                f"such as {{name: red, part: colour}}, or choose mode={SIGMOID}"
            )
        parts.setdefault(entry["part"], []).append(index)
    return list(parts.values())


def check_mode(mode: str, task: str) -> str:
    """The mode. ConfigError if there is none of this name."""
    if mode not in MODES:
        raise ConfigError(f"tasks.{task}.mode={mode}: expected {' or '.join(MODES)}")
    return mode


def _check_levels(levels: Sequence[str], features: Mapping[str, ShapeSpec], task: str) -> None:
    unknown = [level for level in levels if level not in features]
    if unknown or not levels:
        raise ConfigError(
            f"tasks.{task}.levels=[{','.join(levels)}]: expected some of the trunk's levels, which are "
            f"{', '.join(features)}"
        )


def _layers(channels: int, hidden: int, labels: int, dropout: float) -> nn.Sequential:
    widths = [channels, *([hidden] if hidden else []), labels]
    layers: list[nn.Module] = []
    for before, after in pairwise(widths):
        layers += [nn.ReLU()] if layers else []
        layers += [nn.Dropout2d(dropout)] if dropout else []
        layers.append(nn.Conv2d(before, after, 1))
    return nn.Sequential(*layers)


def _per_label(logits: Tensor, truth: Tensor) -> Tensor:
    known = truth != UNKNOWN
    return F.binary_cross_entropy_with_logits(logits[known], truth[known].to(logits.dtype), reduction="sum")
