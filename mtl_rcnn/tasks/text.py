"""Text: lines of text as quadrilaterals, horizontal or oriented (CTPN, arXiv 1609.03605).

Rows of fixed-width strips on a map of the trunk, a recurrent network along the rows, and lines made of strips. Where
the paper leaves a choice, or we depart from it, `modeling.strips` and `modeling.text_lines` say so. The trunk is a
pyramid's level rather than VGG16's conv5_3, and the 3x3 window a convolution rather than copied pixels.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.data.coco_file import are_numbers
from mtl_rcnn.data.faults import Fault, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, ImageTarget, Prediction, Record, Sample, WrittenLabel
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row
from mtl_rcnn.evaluation.icdar import Polygon, Tally, match_by_areas, match_by_iou, submission
from mtl_rcnn.evaluation.quadrilaterals import area, corners, upright, visible_share
from mtl_rcnn.modeling.row_lstm import RowLSTM
from mtl_rcnn.modeling.sampling import LabelSampler
from mtl_rcnn.modeling.slots import DecodedView, Features, ImageTask, LossParts, Output, full_precision
from mtl_rcnn.modeling.strips import StripLabels, StripRules, decode_vertical, grid_strips, label_strips
from mtl_rcnn.modeling.text_lines import connect_strips, suppress_lines
from mtl_rcnn.visualize.canvas import Canvas, color_of

FIELD = "text_lines"
"""Field of an image's entry: a list of {"polygon": 8 numbers, "transcription": text, "ignore": bool}."""

STRIP_STAGE = 2
"""Stage number of the draws of strips."""

_LINE_KNOBS = {
    **dict.fromkeys(("score_thresh", "nms_thresh", "max_gap", "min_overlap", "min_similarity"), float),
    **dict.fromkeys(("min_aspect", "line_score_thresh", "line_nms_thresh"), float),
    **dict.fromkeys(("max_strips", "min_strips"), int),
}


@dataclass
class Lines:
    """The label of one image, network frame.

    Attributes:
        quads: (L, 4, 2) float32 x, y of top left, top right, bottom right, bottom left.
        ignored: (L,) bool: neither text nor background.
        draw: what the sampling of strips is a function of.
    """

    quads: Tensor
    ignored: Tensor
    draw: int


class TextTarget(ImageTarget):
    """Lines of the image's entry `text_lines`. An empty list says that there is no text; no list, that none knows."""

    def check(self, record: Record) -> Coverage:
        """Counts the lines to be found. DataError: see `faults`."""
        for fault in self.faults(record):
            refuse(fault)
        lines = record[FIELD] if self.labelled(record) else []
        return Coverage(image=self.labelled(record), instances=sum(not line.get("ignore") for line in lines))

    def faults(self, record: Record) -> Iterator[Fault]:
        """Lines that are declared and missing, of a wrong form or outside the image; such without area are doubtful."""
        if self.declared(record) is False:
            return
        place = f"dataset '{record['dataset']}', image {record['image_id']}"
        lines = record.get(FIELD)
        if lines is None and self.declared(record):
            text = f"no '{FIELD}', but the dataset declares the task '{self.name}': add the list (empty: no text), or"
            yield _fault("no lines", f"{place} has {text} take '{self.name}' out of the dataset's `tasks`", record)
        elif lines is not None and not isinstance(lines, list):
            yield _fault("malformed lines", f"{place}: '{FIELD}' is {_short(lines)}; expected a list", record)
        for number, line in enumerate(lines if isinstance(lines, list) else []):
            text, fatal = f"is {_short(line)}; expected an object with a 'polygon'", True
            if isinstance(line, Mapping):
                text, fatal = _polygon_fault(line.get("polygon"), record["height"], record["width"])
            if text:
                text = f"{place}, line {number} of '{FIELD}': {text}"
                yield _fault("malformed line" if fatal else "line without area", text, record, fatal)

    def load(self, record: Record, geometry: Geometry) -> Lines | None:
        """The lines in the network frame; such as are more than half outside, or without area, are ignored."""
        if not self.labelled(record):
            return None
        lines = record[FIELD]
        points = [upright(geometry.points(corners(line["polygon"]))) for line in lines]
        seen = [visible_share(quad, geometry.height, geometry.width) for quad in points]
        ignored = [bool(line.get("ignore")) or share < 0.5 for line, share in zip(lines, seen)]
        return Lines(
            torch.tensor(np.array(points).reshape(-1, 4, 2), dtype=torch.float32),
            torch.tensor(ignored, dtype=torch.bool),
            int(torch.randint(1 << 31, ())),
        )

    def as_prediction(self, sample: Sample) -> Prediction:
        """text_polygons (L, 8) and text_scores (L,), all 1, of the lines that are not ignored."""
        label = sample["targets"].get(self.name)
        quads = torch.zeros(0, 4, 2) if label is None else label.quads[~label.ignored]
        return {"text_polygons": quads.reshape(-1, 8), "text_scores": torch.ones(len(quads))}

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel:
        """The lines; those with a lower score than `threshold` are to be ignored."""
        pairs = zip(prediction["text_polygons"].tolist(), prediction["text_scores"].tolist())
        return WrittenLabel(
            image={FIELD: [{"polygon": polygon, "ignore": score < threshold} for polygon, score in pairs]}
        )

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """An outline per line; with its score, if that is not 1."""
        for index, (polygon, score) in enumerate(zip(prediction["text_polygons"], prediction["text_scores"].tolist())):
            canvas.polygon(polygon.tolist(), "" if score == 1 else f"{score:.2f}", color_of(index))

    def labelled(self, record: Record) -> bool:
        """Whether the image's lines are known, and the data set does not say that they are none of its business."""
        return self.declared(record) is not False and record.get(FIELD) is not None


class TextEvaluator(Evaluator):
    """The protocols of ICDAR 2015 (`hmean`, `precision`, `recall`) and 2013 (`deteval_*`), in percent."""

    headline = "hmean"

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """A row per line: `polygon`, 8 numbers clockwise from top left, and `score`."""
        pairs = zip(prediction["text_polygons"].tolist(), prediction["text_scores"].tolist())
        return [{"image_id": record["image_id"], "polygon": polygon, "score": score} for polygon, score in pairs]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """Of all images that are labelled. DataError: a row without a polygon of 8 numbers."""
        found = self._by_image(rows)
        target = TextTarget(self.name, self.label_space)
        labelled = [record for record in self.records if target.labelled(record)]
        lines = sum(not line.get("ignore") for record in labelled for line in record[FIELD])
        reason = "no lines to be found" if not lines else None if rows else "no predictions"
        metrics = {}
        for prefix, match in (("", match_by_iou), ("deteval_", match_by_areas)):
            total = sum((_tally(match, record[FIELD], found[record["image_id"]]) for record in labelled), Tally())
            for name in ("hmean", "precision", "recall"):
                metrics[prefix + name] = Metric(100 * getattr(total, name), reason=reason)
        return metrics

    def files(self, rows: Sequence[Row]) -> dict[str, bytes]:
        """What the site of the ICDAR competitions takes: zip files of res_<stem>.txt, eight coordinates per line (2015)
        and upright boxes (2013). None where names of images repeat."""
        found = self._by_image(rows)
        images = {Path(record["file_name"]).stem: found[record["image_id"]] for record in self.records}
        if len(images) < len(self.records):
            return {}
        return {"_icdar2015.zip": submission(images), "_icdar2013.zip": submission(images, boxes=True)}

    def _by_image(self, rows: Sequence[Row]) -> dict[Any, list[Polygon]]:
        found: dict[Any, list[Polygon]] = {record["image_id"]: [] for record in self.records}
        for index, row in enumerate(rows):
            polygon = row.get("polygon")
            if not isinstance(polygon, list) or len(polygon) != 8 or not are_numbers(polygon):
                raise DataError(f"row {index}: polygon is {_short(polygon)}; expected 8 finite numbers")
            found[row["image_id"]].append(polygon)
        return found


class TextTask(ImageTask):
    """A 3x3 convolution, a bidirectional LSTM along the rows, one more layer; per position k anchors with a score each
    for text and for none, two vertical coordinates, and the offset of the line's nearer end.

    Views of test-time augmentation are merged as lines. Mirrored views are left out: mirrored text is no text.

    Args:
        level: of the trunk; anchors are as wide as its stride, 16 pixels in the paper.
        anchor_heights: k heights in pixels of the network frame.
        conv_dim, hidden_dim, fc_dim: channels of the convolution, of each direction, and of the layer after it.
        recurrence: False puts a 1x1 convolution in place of the LSTM.
        side_refinement: False leaves the offsets and their loss out.
        strips: `StripRules`, and per_image and positive_fraction of the sampling.
        smooth_l1_beta: where the losses of coordinates turn from squares to absolute values.
        lines: arguments of `connect_strips`, and line_nms_thresh of `suppress_lines`.
    """

    target_class = TextTarget
    evaluator_class = TextEvaluator
    loss_parts = ("cls", "vertical", "side")

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        *,
        level: str,
        anchor_heights: Sequence[float],
        conv_dim: int,
        recurrence: bool,
        hidden_dim: int,
        fc_dim: int,
        side_refinement: bool,
        strips: Mapping[str, Any],
        smooth_l1_beta: float,
        lines: Mapping[str, Any],
    ) -> None:
        super().__init__(name, label_space, features)
        if level not in features:
            raise ConfigError(f"tasks.{name}.level={level}: the trunk has {', '.join(features)}")
        if not anchor_heights or min(anchor_heights) <= 0:
            raise ConfigError(f"tasks.{name}.anchor_heights={list(anchor_heights)}: expected heights above 0 in pixels")
        self.level, self.stride = level, int(features[level].stride)
        self.register_buffer("heights", torch.tensor([float(h) for h in anchor_heights]), persistent=False)
        self.side_refinement = side_refinement
        if not side_refinement:
            self.loss_parts = ("cls", "vertical")
        self.rules, self.per_image, self.positive_fraction = _strip_settings(name, strips)
        self.smooth_l1_beta = float(smooth_l1_beta)
        self.window = nn.Conv2d(features[level].channels, conv_dim, 3, padding=1)
        along = RowLSTM(conv_dim, hidden_dim) if recurrence else nn.Conv2d(conv_dim, 2 * hidden_dim, 1)
        self.along, self.recurrence = along, recurrence
        self.fc = nn.Conv2d(2 * hidden_dim, fc_dim, 1)
        self.values = 5 if side_refinement else 4
        self.predictor = nn.Conv2d(fc_dim, self.values * len(anchor_heights), 1)
        for layer in (self.window, self.fc):
            nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            nn.init.zeros_(layer.bias)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)
        for knob, kind in _LINE_KNOBS.items():
            setattr(self, knob, kind(lines[knob]))

    def outputs(self) -> list[Output]:
        """Lines, best first."""
        corners_ = "corners x1, y1, ..., x4, y4 of lines of text, clockwise from top left, in pixels of the image"
        return [
            Output("text_polygons", "(L, 8)", "float32", corners_),
            Output("text_scores", "(L,)", "float32", "mean score of each line's strips, in 0..1, descending"),
        ]

    def forward(self, features: Features) -> Tensor:
        """(B, H, W, k, 5) per anchor: scores of none and of text, v_c, v_h, and o (4 without side refinement)."""
        x = self.along(self.window(features[self.level]).relu())
        x = self.predictor(self.fc(x if self.recurrence else x.relu()).relu())
        batch, channels, height, width = x.shape
        return x.view(batch, channels // self.values, self.values, height, width).permute(0, 3, 4, 1, 2)

    def losses(self, raw: Tensor, targets: list[Lines], image_sizes: Sequence[tuple[int, int]]) -> LossParts:
        """`cls`: softmax cross-entropy of the drawn anchors. `vertical`, `side`: smooth L1 of all anchors that have
        such a target, drawn or not. Counts are the numbers of these anchors: N_s, N_v, N_o (CTPN, equation 5)."""
        anchors = grid_strips(raw, self.heights, self.stride)
        values = full_precision(raw).flatten(1, 3)
        labels = [self._label(anchors, raw, target, size) for target, size in zip(targets, image_sizes)]
        drawn = [torch.nonzero(label.labels >= 0).squeeze(1) for label in labels]
        chosen = _rows(values, drawn)[:, :2]
        truth = torch.cat([label.labels[rows] for label, rows in zip(labels, drawn)] or [chosen.new_zeros(0).long()])
        parts = {"cls": (F.cross_entropy(chosen, truth, reduction="sum"), _count(truth))}
        valid = [torch.nonzero(label.valid).squeeze(1) for label in labels]
        vertical = [label.vertical[rows] for label, rows in zip(labels, valid)]
        parts["vertical"] = self._distance(_rows(values, valid)[:, 2:4], vertical)
        if self.side_refinement:
            beside = [torch.nonzero(label.beside).squeeze(1) for label in labels]
            side = [label.side[rows, None] for label, rows in zip(labels, beside)]
            parts["side"] = self._distance(_rows(values, beside)[:, 4:], side)
        return parts

    @torch.jit.export
    def decode(self, raw: Tensor, padded_size: Tensor) -> dict[str, Tensor]:
        """text_strips (B, H * W * k, 5): centre x, top, bottom, x of the line's nearer end, score; pixels of the
        padded network frame. Without side refinement the fourth is the centre."""
        anchors = grid_strips(raw, self.heights, self.stride)
        values = raw.float().flatten(1, 3)
        top, bottom = decode_vertical(anchors, values[..., 2:4])
        x = anchors[:, 0].expand_as(top)
        side = x + values[..., 4] * self.stride if self.side_refinement else x
        score = values[..., :2].softmax(dim=-1)[..., 1]
        return {"text_strips": torch.stack([x, top, bottom, side, score], dim=-1)}

    @torch.jit.export
    def to_image(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """text_polygons (L, 8) float32, clipped to the image, and text_scores (L,), best first."""
        polygons, scores = self.connect(decoded["text_strips"], network_size, image_size)
        polygons, scores = suppress_lines(polygons, scores, self.line_nms_thresh)
        return {"text_polygons": polygons, "text_scores": scores}

    def connect(self, strips: Tensor, network_size: Tensor, image_size: Tensor) -> tuple[Tensor, Tensor]:
        """Lines (L, 8) and scores (L,) of one view in the image's frame, unordered; see `connect_strips`."""
        polygons, scores = connect_strips(
            strips,
            network_size,
            float(self.stride),
            self.side_refinement,
            self.score_thresh,
            self.nms_thresh,
            self.max_strips,
            self.max_gap,
            self.min_overlap,
            self.min_similarity,
            self.min_strips,
            self.min_aspect,
            self.line_score_thresh,
        )
        limit = image_size.flip(0).to(polygons.dtype)
        scale = limit / network_size.flip(0).to(polygons.dtype)
        return torch.minimum((polygons * scale.repeat(4)).clamp(min=0), limit.repeat(4)), scores

    def merge_views(self, views: list[DecodedView], image_size: Tensor) -> dict[str, Tensor]:
        """The lines of all views that are not mirrored, of overlapping ones the best."""
        found = [
            self.connect(view.decoded["text_strips"], view.network_size, image_size)
            for view in views
            if not view.mirrored
        ]
        polygons, scores = (torch.cat(parts) for parts in zip(*found))
        polygons, scores = suppress_lines(polygons, scores, self.line_nms_thresh)
        return {"text_polygons": polygons, "text_scores": scores}

    def _label(self, anchors: Tensor, raw: Tensor, target: Lines, image_size: tuple[int, int]) -> StripLabels:
        """Labels of one image; of the positive and negative ones only the drawn."""
        quads, ignored = target.quads.to(raw.device), target.ignored.to(raw.device)
        found = label_strips(anchors, tuple(raw.shape[1:4]), quads, ignored, image_size, self.stride, self.rules)
        draw = LabelSampler("keyed", target.draw)
        positive, negative = draw(found.labels, self.per_image, self.positive_fraction, 0, 0, STRIP_STAGE)
        found.labels.fill_(-1)
        found.labels[positive] = 1
        found.labels[negative] = 0
        return found

    def _distance(self, found: Tensor, truth: list[Tensor]) -> tuple[Tensor, Tensor]:
        expected = torch.cat(truth or [torch.zeros_like(found)]).to(found.dtype)
        return F.smooth_l1_loss(found, expected, reduction="sum", beta=self.smooth_l1_beta), _count(found)


def _strip_settings(name: str, strips: Mapping[str, Any]) -> tuple[StripRules, int, float]:
    rules = {key: float(value) for key, value in strips.items() if key not in ("per_image", "positive_fraction")}
    try:
        return StripRules(**rules), int(strips["per_image"]), float(strips["positive_fraction"])
    except (TypeError, KeyError) as error:
        raise ConfigError(f"tasks.{name}.strips: {error}; see configs/tasks/{name}.yaml") from error


def _rows(values: Tensor, chosen: list[Tensor]) -> Tensor:
    """Rows of every image's values (A, D), one after the other."""
    return torch.cat([image[rows] for image, rows in zip(values, chosen)] or [values.reshape(-1, values.shape[-1])])


def _count(rows: Tensor) -> Tensor:
    return torch.tensor(float(len(rows)), device=rows.device)


def _tally(match: Any, lines: Sequence[Mapping[str, Any]], found: Sequence[Polygon]) -> Tally:
    return match([line["polygon"] for line in lines], [bool(line.get("ignore")) for line in lines], found)


def _polygon_fault(polygon: Any, height: int, width: int) -> tuple[str, bool]:
    """What is wrong with a line's polygon, "" if nothing is, and whether it cannot be trained on."""
    if not isinstance(polygon, list) or len(polygon) != 8:
        return (
            f"its polygon is {_short(polygon)}; expected 8 numbers x1, y1, ..., x4, y4, clockwise",
            True,
        )
    if not are_numbers(polygon):
        return f"its polygon {_short(polygon)} has a coordinate that is not finite; repair or remove the line", True
    x, y = polygon[0::2], polygon[1::2]
    found = f"its polygon, from ({min(x):g}, {min(y):g}) to ({max(x):g}, {max(y):g}),"
    if max(x) <= 0 or min(x) >= width or max(y) <= 0 or min(y) >= height:
        return f"{found} lies outside the image of {width} x {height} pixels; correct or remove it", True
    if min(x) < -width or max(x) > 2 * width or min(y) < -height or max(y) > 2 * height:
        return f"{found} reaches far beyond the image of {width} x {height} pixels; correct or remove it", True
    if area(corners(polygon)) == 0:
        return f"its polygon {_short(polygon)} has no area; it is ignored in training", False
    return "", False


def _fault(kind: str, text: str, record: Record, fatal: bool = True) -> Fault:
    return Fault(kind, text, image_id=record["image_id"], field=FIELD, fatal=fatal)


def _short(value: Any) -> str:
    words = repr(value)
    return words if len(words) <= 80 else words[:77] + "..."
