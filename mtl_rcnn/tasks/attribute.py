"""Attribute: what an object is like, beside its class: one of several values, any of several values, or a number.

Attributes come in groups, entries of the vocabulary `attributes`; a group may belong to some classes only. The head is
one linear layer over all groups on the features of the box, as in Fashionpedia's Attribute-Mask R-CNN (arXiv
2004.12276, section 4), whose loss is the plain binary cross-entropy (focal loss, arXiv 1708.02002, is an option here).
With `class_hidden` it also sees the class, as in bottom-up attention (arXiv 1707.07998, section 3.1): the true one in
training, the predicted one at test time.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.box_head import FastRCNNConvFCHead
from detectron2.structures import Instances
from fvcore.nn import sigmoid_focal_loss, smooth_l1_loss
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.data.attribute_groups import (
    BINARY,
    CATEGORICAL,
    MULTILABEL,
    SCALAR,
    VOCABULARY,
    Group,
    Labels,
    any_known,
    expected_label,
    mirrored_columns,
    read_groups,
    short,
)
from mtl_rcnn.data.coco_file import are_numbers
from mtl_rcnn.data.dataset_spec import suggest
from mtl_rcnn.data.faults import Fault, Repair, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, InstanceTarget, Prediction, Record, Sample, WrittenLabel, place_of
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.coco_rows import RowReader, xyxy_to_xywh
from mtl_rcnn.evaluation.coco_truth import number_images
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row, dataset_category_id
from mtl_rcnn.evaluation.joint_ap import (
    THRESHOLDS,
    Encounter,
    Located,
    encounters,
    find_objects,
    joint_average_precision,
    label_f1,
)
from mtl_rcnn.evaluation.multilabel import UNKNOWN, Decisions, multilabel_metrics
from mtl_rcnn.modeling.slots import LossParts, Output, RoiTask, full_precision
from mtl_rcnn.visualize.canvas import Canvas, color_of

logger = logging.getLogger(__name__)


class AttributeTarget(InstanceTarget):
    """The annotations' `attributes`: {group: value}. A categorical value is a name, a multilabel one a list of names
    ([]: none of them), a binary one true or false, a scalar a number; a group that is missing or null is unknown.

    Args:
        ignore: keys of `attributes` that are not read.
        shown: least probability of what `draw` names.
    """

    def __init__(self, name: str, label_space: LabelSpace, *, ignore: Sequence[str] = (), shown: float = 0.5) -> None:
        super().__init__(name, label_space)
        self.groups = read_groups(label_space, name)
        self.labels = Labels(self.groups)
        self.ignore = set(ignore)
        self.shown = shown

    def check(self, record: Record) -> Coverage:
        """Counts instances of which anything is known. DataError: an unknown group or value, a value of another type,
        a group of other classes, attributes that are declared but missing."""
        if self.declared(record) is False:
            return Coverage(image=False)
        for fault in self.faults(record):
            refuse(fault)
        objects = [annotation for annotation in record["annotations"] if not annotation["iscrowd"]]
        known = int(any_known(*self.labels(objects)).sum())
        return Coverage(image=self.declared(record) is True or known > 0 or not objects, instances=known)

    def faults(self, record: Record) -> Iterator[Fault]:
        """Attributes that no group or value is meant for, of another type, of other classes; declared, but missing."""
        if self.declared(record) is False:
            return
        for annotation in record["annotations"]:
            given = annotation.get(VOCABULARY)
            if given is None:
                if self.declared(record) and not annotation["iscrowd"] and self._has_groups(annotation):
                    text = (
                        f"has no '{VOCABULARY}', but the dataset declares the task '{self.name}': add them ({{}} if "
                        f"nothing is known), or take '{self.name}' out of the dataset's `tasks`"
                    )
                    yield self._fault("no attributes", text, record, annotation, {})
            elif not isinstance(given, Mapping):
                text = f"has {VOCABULARY} {short(given)}: expected an object, group -> value"
                yield self._fault("malformed attributes", text, record, annotation, {})
            else:
                yield from self._value_faults(record, annotation, given)

    def load(
        self, record: Record, annotations: Sequence[Mapping[str, Any]], geometry: Geometry
    ) -> dict[str, Any] | None:
        """`gt_attribute_values`: (N, V) int64, 1 holds, 0 does not, -1 unknown; `gt_attribute_scalars`: (N, S) float32,
        nan where unknown; `gt_has_attribute`: (N,) bool, whether anything is known."""
        if self.declared(record) is False:
            return None
        values, scalars = self.labels(annotations)
        if geometry.mirrored:
            values = values[:, mirrored_columns(self.groups)]
        return {
            "gt_attribute_values": torch.from_numpy(values),
            "gt_attribute_scalars": torch.from_numpy(scalars).float(),
            f"gt_has_{self.name}": torch.from_numpy(any_known(values, scalars)),
        }

    def as_prediction(self, sample: Sample) -> Prediction:
        """attribute_scores (N, V): 1 what holds, 0 what does not or is unknown; attribute_scalars (N, S), nan where
        unknown."""
        instances: Instances = sample["instances"]
        number = len(instances)
        if not instances.has("gt_attribute_values"):
            scalars = torch.full((number, self.labels.scalars), torch.nan)
            return {"attribute_scores": torch.zeros(number, self.labels.values), "attribute_scalars": scalars}
        scores = (instances.gt_attribute_values == 1).float()
        return {"attribute_scores": scores, "attribute_scalars": instances.gt_attribute_scalars.clone()}

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel:
        """`attributes` of each object: a categorical value that is likely enough, whether a binary one holds or not,
        and a multilabel group if every one of its values is sure. Scalars, of which nobody says how sure they are, stay
        unknown."""
        entries = self.label_space.vocabularies[VOCABULARY]
        writable = {entries[index]["name"] for index in record["vocabularies"].get(VOCABULARY, {}).values()}
        groups = [group for group in self.groups if group.kind != SCALAR and group.name in writable]
        rows: list[dict[str, Any] | None] = []
        for class_index, scores in zip(prediction["classes"].tolist(), prediction["attribute_scores"].tolist()):
            own = [(group, scores[group.columns]) for group in groups if class_index in group.classes]
            sure = {group.name: _sure(group, probabilities, threshold) for group, probabilities in own}
            known = {name: label for name, label in sure.items() if label is not None}
            rows.append({VOCABULARY: known} if known else None)
        return WrittenLabel(annotations=rows)

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """Under each box what holds, such as "red, striped, age 31": values of at least `shown`, and scalars."""
        rows = zip(*(prediction[key].tolist() for key in ("boxes", "classes", "attribute_scores", "attribute_scalars")))
        for index, (box, class_index, scores, scalars) in enumerate(rows):
            words = []
            for group in self.groups:
                if class_index not in group.classes:
                    continue
                if group.kind == SCALAR:
                    number = scalars[group.start]
                    words += [f"{group.name} {number:.3g}"] if np.isfinite(number) else []
                    continue
                own = scores[group.columns]
                best = max(own) if group.kind == CATEGORICAL else self.shown
                words += [v for v, score in zip(group.values, own) if score >= max(best, self.shown)]
            if words:
                canvas.note(box, ", ".join(words), color_of(index))

    def _has_groups(self, annotation: Mapping[str, Any]) -> bool:
        return any(annotation["category_id"] in group.classes for group in self.groups)

    def _value_faults(self, record: Record, annotation: Mapping[str, Any], given: Mapping[str, Any]) -> Iterator[Fault]:
        found = {name: fault for name, label in given.items() if (fault := self._value_fault(name, label, annotation))}
        good = {name: label for name, label in given.items() if name not in found}
        for kind, text in found.values():
            yield self._fault(kind, text, record, annotation, good)

    def _value_fault(self, name: str, label: Any, annotation: Mapping[str, Any]) -> tuple[str, str] | None:
        """Kind and text of what is wrong with one label, None if nothing is."""
        if name in self.ignore:
            return None
        group = self.labels.groups.get(name)
        if group is None:
            known = self.labels.groups
            return "unknown attribute", (
                f"has the attribute '{name}', which the vocabulary '{VOCABULARY}' lacks{suggest(name, known)}; it has "
                f"{', '.join(known)}: add it there, or name it in tasks.{self.name}.target.ignore"
            )
        if label is None:
            return None
        if annotation["category_id"] not in group.classes:
            own = self.label_space.classes[annotation["category_id"]]
            others = ", ".join(self.label_space.classes[index] for index in sorted(group.classes)) or "no class"
            text = f"has the attribute '{name}', but is a '{own}': the attribute belongs to {others}"
            return "attribute of another class", text
        expected = expected_label(group, label)
        if expected:
            return "attribute of another type", f"has the attribute {name}={short(label)}: expected {expected}"
        for value in label if group.kind == MULTILABEL else [label] if group.kind == CATEGORICAL else []:
            if value not in group.values:
                hint = suggest(value, group.values)
                text = f"has the attribute {name}={value!r}, which is not one of {', '.join(group.values)}{hint}"
                return "unknown attribute value", text
        return None

    def _fault(
        self, kind: str, text: str, record: Record, annotation: Mapping[str, Any], good: Mapping[str, Any]
    ) -> Fault:
        """A fault that these attributes would mend; several of one annotation all carry the same."""
        repair = Repair("take the attribute out", fields={VOCABULARY: dict(good)})
        ids = {"image_id": record["image_id"], "annotation_id": annotation["id"]}
        return Fault(kind, f"{place_of(record, annotation)} {text}", field=VOCABULARY, repair=repair, **ids)


class AttributeEvaluator(Evaluator):
    """How well attributes are said of the annotated boxes (`gt/...`), of the detections that found an object
    (`det/...`), and how well boxes and attributes are found together. In percent but for scalars; docs/attributes.md
    explains all.

    AP_iou_f1: Fashionpedia's AP_IoU+F1: detections must have an IoU of at least t with an object of their class and
        agree with its values to an F1 of at least f; the mean over t and f in 0.5, 0.55 ... 0.95, recalls, and classes.
        Its F1 is the mean of that of what holds and that of what does not hold, so that values which hold nowhere
        inflate it (`joint_ap.label_f1`).
    AP_iou_f1_positive: the same with the F1 of what holds alone.
    AP_iou: the same without attributes, what both could be at most.
    gt/X, det/X: mAP, mA, micro_F1, macro_F1, AP/<group>.<value> and others of `multilabel_metrics`; accuracy/<group> of
        a categorical group (is the likeliest value the right one), accuracy their mean; MAE/<group>, RMSE/<group> of a
        scalar. det/found: objects found at an IoU of 0.5, of those of which anything is known.

    Objects of which nothing is known are ignore regions in the first three, and have no part in the others; a value
    that is not known counts nowhere.

    Args:
        threshold: from which probability on a multilabel or binary value is said to hold; of a categorical group the
            likeliest holds.
        other_classes: whether the first three are also over classes without groups, which need no attributes.

    Raises:
        DataError: attributes of the records that are malformed; unknown groups are left aside.
    """

    headline = "AP_iou_f1_positive"
    on_truth = True

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        records: Sequence[Record],
        *,
        threshold: float = 0.5,
        other_classes: bool = False,
    ) -> None:
        super().__init__(name, label_space, records)
        self.groups = read_groups(label_space, name)
        self.labels = Labels(self.groups)
        given = [entry.get(VOCABULARY) for record in records for entry in record["annotations"]]
        others = {key for labels in given if isinstance(labels, Mapping) for key in labels} - self.labels.groups.keys()
        self.target = AttributeTarget(name, label_space, ignore=sorted(others))
        for record in records:  # evaluation sets are not checked before
            self.target.check(record)
        self.threshold = threshold
        self.other_classes = other_classes

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """Of each detection: bbox [x, y, w, h], `attributes` {group: value} of its class's groups, and what they were
        made of, `attribute_scores` and `attribute_scalars` (see `AttributeTask.manifest` for their order)."""
        boxes = xyxy_to_xywh(prediction["boxes"])
        names = ("classes", "scores", "attribute_scores", "attribute_scalars")
        rows = []
        for box, class_index, score, scores, scalars in zip(boxes, *(prediction[name].tolist() for name in names)):
            category_id = dataset_category_id(record, class_index)
            if category_id is not None:
                row = {"image_id": record["image_id"], "category_id": category_id, "bbox": box, "score": score}
                rows.append(row | self._said(class_index, scores, scalars))
        return rows

    def truth_rows(self, record: Record, annotations: Sequence[Mapping[str, Any]], prediction: Prediction) -> list[Row]:
        """The same of annotated boxes, with `annotation_id`; of those of which anything is known."""
        if self.target.declared(record) is False:
            return []
        known = torch.from_numpy(any_known(*self.labels(annotations)))
        rows = self.rows(record, {key: value[known] for key, value in prediction.items()})
        ids = [entry["id"] for entry, is_known in zip(annotations, known.tolist()) if is_known]
        return [{**row, "annotation_id": number} for row, number in zip(rows, ids, strict=True)]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """See the class. DataError: a row of another form than `rows` gives."""
        said, objects = self._read(rows), self._annotated()
        looked_at = np.array([row.get("annotation_id") is not None for row in rows], dtype=bool)
        metrics, pairs = self._together(said.at(np.flatnonzero(~looked_at)), objects)
        given = np.flatnonzero(looked_at)
        place = {number: index for index, number in enumerate(objects.ids)}
        truth = np.array([place.get(rows[index]["annotation_id"], -1) for index in given], dtype=np.int64)
        metrics |= self._apart("gt", said.at(given[truth >= 0]), objects.at(truth[truth >= 0]))
        return metrics | self._apart("det", said.at(np.flatnonzero(~looked_at)[pairs[0]]), objects.at(pairs[1]))

    def _said(self, class_index: int, scores: Sequence[float], scalars: Sequence[float]) -> Row:
        scores = [round(score, 6) for score in scores]
        numbers = [float(f"{number:.7g}") if np.isfinite(number) else None for number in scalars]
        attributes: dict[str, Any] = {}
        for group in self.groups:
            if class_index not in group.classes:
                continue
            own = dict(zip(group.values, scores[group.columns]))
            if group.kind == SCALAR:
                attributes[group.name] = numbers[group.start]
            elif group.kind == CATEGORICAL:
                attributes[group.name] = max(own, key=own.__getitem__)
            else:
                chosen = [value for value, score in own.items() if score >= self.threshold]
                attributes[group.name] = chosen if group.kind == MULTILABEL else bool(chosen)
        return {VOCABULARY: attributes, "attribute_scores": scores, "attribute_scalars": numbers}

    def _read(self, rows: Sequence[Row]) -> _Said:
        """Checks and converts rows."""
        classes = range(len(self.label_space.classes))
        read = RowReader(self.records, number_images(self.records), self.label_space, classes, "bbox")(rows)
        widths = {"attribute_scores": self.labels.values, "attribute_scalars": self.labels.scalars}
        ids = {None, *(entry["id"] for record in self.records for entry in record["annotations"])}
        for index, row in enumerate(rows):
            place = f"results row {index} of dataset '{self.records[0].get('dataset', '')}'"
            for key, count in widths.items():
                given = row.get(key)
                numbers = [value for value in given if value is not None] if isinstance(given, list) else []
                if not isinstance(given, list) or len(given) != count or not are_numbers(numbers):
                    raise DataError(f"{place}: '{key}' is {short(given)}, expected a list of {count} numbers")
            number = row.get("annotation_id")
            if not isinstance(number, int | str | None) or number not in ids:
                raise DataError(f"{place}: annotation_id {short(number)} is not in the dataset")
        boxes = Located(
            np.array([row["image_id"] for row in read], dtype=np.int64),
            np.array([row["category_id"] for row in read], dtype=np.int64),
            np.array([row["bbox"] for row in read], dtype=np.float64).reshape(-1, 4),
        )
        scores, scalars = (
            np.array([row[key] for row in rows], dtype=np.float64).reshape(len(rows), count)
            for key, count in widths.items()
        )
        return _Said(boxes, np.array([row["score"] for row in read], dtype=np.float64), scores, scalars)

    def _annotated(self) -> _Annotated:
        """The objects of the classes that are scored."""
        numbers = number_images(self.records)
        scored = set(range(len(self.label_space.classes))) if self.classes is None else set(self.classes)
        if not self.other_classes:
            scored &= {index for group in self.groups for index in group.classes}
        entries = [
            (numbers[record["image_id"]], entry)
            for record in self.records
            for entry in record["annotations"]
            if entry["category_id"] in scored and "bbox" in entry
        ]
        unlabelled = {numbers[record["image_id"]] for record in self.records if self.target.declared(record) is False}
        values, scalars = self.labels([{} if number in unlabelled else entry for number, entry in entries])
        boxes = Located(
            np.array([number for number, _ in entries], dtype=np.int64),
            np.array([entry["category_id"] for _, entry in entries], dtype=np.int64),
            np.array([entry["bbox"] for _, entry in entries], dtype=np.float64).reshape(-1, 4),
        )
        crowd = np.array([bool(entry["iscrowd"]) for _, entry in entries], dtype=bool)
        return _Annotated(boxes, values, scalars, crowd, [entry["id"] for _, entry in entries])

    def _together(self, said: _Said, objects: _Annotated) -> tuple[dict[str, Metric], np.ndarray]:
        """Boxes and attributes in one, over all classes and per class; and (2, P) which detection found which object of
        which anything is known, at an IoU of 0.5."""
        described = np.isin(objects.boxes.classes, [index for group in self.groups for index in group.classes])
        ignored, chosen = described & ~objects.known, self._chosen(said.scores)
        cells: dict[str, list[float]] = {name: [] for name in _TOGETHER}
        metrics: dict[str, Metric] = {}
        pairs: list[tuple[int, int]] = []
        for class_index, met in encounters(said.boxes, said.confidence, objects.boxes, ignored, objects.crowd).items():
            ticked = any(class_index in group.classes for group in self.groups if group.kind != SCALAR)
            both = [label_f1(chosen[one.detections], objects.values[one.objects]) for one in met]
            for name, kind in _TOGETHER.items():
                alike = [f1s[kind] for f1s in both] if ticked and kind is not None else None
                least = np.zeros(1) if alike is None else THRESHOLDS
                precision = joint_average_precision(met, alike, agreements=least)
                if precision is not None:
                    cells[name] += precision.mean(axis=0).tolist()
                    metrics[f"{name}/{self.label_space.classes[class_index]}"] = _percent(precision.mean())
            pairs += [pair for one in met for pair in _found(one)]
        reason = "no detections" if not len(said.confidence) else None if any(cells.values()) else "nothing to find"
        whole = {name: _percent(np.mean(values) if values else 0.0, reason) for name, values in cells.items()}
        hits, sought = np.array(pairs, dtype=np.int64).reshape(-1, 2).T
        known = objects.known[sought]
        if objects.known.any():
            metrics["det/found"] = _percent(known.sum() / objects.known.sum())
        return whole | metrics, np.stack([hits[known], sought[known]])

    def _apart(self, prefix: str, said: _Said, objects: _Annotated) -> dict[str, Metric]:
        """Attributes alone, of boxes and the objects they are of, row by row."""
        decisions = Decisions(said.scores, self._chosen(said.scores), objects.values)
        metrics: dict[str, Metric] = {}
        if (objects.values != UNKNOWN).any():
            names = [label for group in self.groups for label in group.labels if group.kind != SCALAR]
            groups = {f"accuracy/{group.name}" for group in self.groups}
            found = multilabel_metrics(decisions, names).items()
            metrics |= {key: value for key, value in found if not key.startswith("accuracy/") or key in groups}
            metrics |= self._accuracies(decisions)
        elif self.labels.values:
            reason = "no object of known attributes was looked at"
            metrics |= {name: Metric(0.0, reason=reason) for name in ("mAP", "mA", "micro_F1", "macro_F1")}
        for group in self.groups:
            if group.kind == SCALAR:
                error = said.scalars[:, group.start] - objects.scalars[:, group.start]
                error = error[np.isfinite(error)]
                if len(error):
                    metrics[f"MAE/{group.name}"] = Metric(float(np.abs(error).mean()), higher_is_better=False)
                    rmse = float(np.sqrt((error**2).mean()))
                    metrics[f"RMSE/{group.name}"] = Metric(rmse, higher_is_better=False)
        return {f"{prefix}/{name}": metric for name, metric in metrics.items()}

    def _accuracies(self, decisions: Decisions) -> dict[str, Metric]:
        """Of categorical groups: is the likeliest value the right one."""
        metrics = {}
        for group in self.groups:
            truth = decisions.truth[:, group.columns]
            known = (truth != UNKNOWN).any(axis=1)
            if group.kind == CATEGORICAL and known.any():
                right = decisions.chosen[known, group.columns].argmax(axis=1) == truth[known].argmax(axis=1)
                metrics[f"accuracy/{group.name}"] = _percent(right.mean())
        mean = [metric.value for metric in metrics.values()]
        return metrics | ({"accuracy": Metric(sum(mean) / len(mean))} if mean else {})

    def _chosen(self, scores: np.ndarray) -> np.ndarray:
        """(N, V) bool, the values that are said to hold."""
        chosen = scores >= self.threshold
        for group in self.groups:
            if group.kind == CATEGORICAL:
                own = scores[:, group.columns]
                chosen[:, group.columns] = np.arange(own.shape[1]) == own.argmax(axis=1)[:, None]
        return chosen


class AttributeTask(RoiTask):
    """Convolutions and linear layers on the features of the box, then one linear layer over all groups.

    Args:
        conv_dims, fc_dims, norm: layers before it, as of the detector's second stage.
        scalars: scalar group -> mean and standard deviation of its values; absent ones have those of the vocabulary.
        class_hidden: H units of a layer between that also sees the class, relu(W features + e[class]), 0 for none: what
            the features and an embedding of the class, concatenated, become in a linear layer (bottom-up attention,
            section 3.1, as of the code of arXiv 2001.03615).
        focal_gamma, focal_alpha: of multilabel and binary groups, see `sigmoid_focal_loss` of fvcore; 0 and -1 are
            plain binary cross-entropy.
        smooth_l1_beta: of scalars, in their standard deviations.
    """

    target_class = AttributeTarget
    evaluator_class = AttributeEvaluator
    loss_parts = ("bce", "ce", "smooth_l1")

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        *,
        conv_dims: Sequence[int],
        fc_dims: Sequence[int],
        norm: str,
        scalars: Mapping[str, Sequence[float]],
        class_hidden: int,
        focal_gamma: float,
        focal_alpha: float,
        smooth_l1_beta: float,
        **pooling: Any,
    ) -> None:
        super().__init__(name, label_space, features, **pooling)
        self.groups = read_groups(label_space, name)
        ticked = [group for group in self.groups if group.kind != SCALAR]
        measured = [group for group in self.groups if group.kind == SCALAR]
        moments = self._moments(measured, scalars)
        self.num_values = sum(len(group.values) for group in ticked)
        self.num_scalars = len(measured)
        self.sizes = [*(len(group.values) for group in ticked), self.num_scalars]  # of the channels, in order
        self.exclusive = [*(group.kind == CATEGORICAL for group in ticked), False]
        self.focal = (float(focal_gamma), float(focal_alpha))
        self.smooth_l1_beta = float(smooth_l1_beta)
        mirror = [*mirrored_columns(self.groups), *range(self.num_values, self.num_values + self.num_scalars)]
        channels = [group for group in self.groups for _ in group.values or (group.name,)]
        belongs = [[index in group.classes for group in channels] for index in range(self.num_classes)]
        free = [group.kind != CATEGORICAL for group in ticked for _ in group.values]
        for key, value in (
            ("mirror", torch.tensor(mirror, dtype=torch.int64)),
            ("belongs", torch.tensor(belongs, dtype=torch.bool)),
            ("free", torch.tensor(free, dtype=torch.bool)),
            ("mean", torch.tensor([mean for mean, _ in moments])),
            ("std", torch.tensor([std for _, std in moments])),
        ):
            self.register_buffer(key, value, persistent=False)
        self.head = FastRCNNConvFCHead(
            self.pooled_shape, conv_dims=list(conv_dims), fc_dims=list(fc_dims), conv_norm=norm
        )
        shape = self.head.output_shape
        width = shape.channels * (shape.height or 1) * (shape.width or 1)
        self.hidden = self.class_embedding = None
        if class_hidden:
            self.hidden, self.class_embedding = (
                nn.Linear(width, class_hidden),
                nn.Embedding(self.num_classes, class_hidden),
            )
            nn.init.zeros_(self.class_embedding.weight)
        self.predictor = nn.Linear(class_hidden or width, self.num_values + self.num_scalars)
        nn.init.normal_(self.predictor.weight, std=0.01)
        nn.init.zeros_(self.predictor.bias)

    def outputs(self) -> list[Output]:
        """Probabilities of all groups' values, and scalars."""
        probability = "probability of each value of each group, see `attributes`; 0 where a group is not of the class"
        scalar = "each scalar group's number, see `attributes`; 0 where a group is not of the class"
        return [
            Output("attribute_scores", f"(N, {self.num_values})", "float32", probability),
            Output("attribute_scalars", f"(N, {self.num_scalars})", "float32", scalar),
        ]

    def manifest(self) -> dict[str, Any]:
        """`attributes`: per group its name, type, values, the output that holds it and from which column on, and the
        class indices it belongs to."""
        return {
            "attributes": [
                {
                    "name": group.name,
                    "type": group.kind,
                    "values": list(group.values),
                    "output": "attribute_scalars" if group.kind == SCALAR else "attribute_scores",
                    "offset": group.start,
                    "classes": sorted(group.classes),
                }
                for group in self.groups
            ]
        }

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, V + S): a logit per value, then scalars in standard deviations from their means; or, with `class_hidden`,
        (R, H) what the layer that sees the class gets of the features."""
        features = torch.flatten(self.head(pooled), start_dim=1)
        if self.hidden is not None:
            return self.hidden(features)
        return self.predictor(features)

    def losses(self, raw: Tensor, regions: list[Instances]) -> LossParts:
        """Sums over what is known of the R selected regions: `bce` binary cross-entropy (or focal loss) per multilabel
        and binary value, `ce` cross-entropy per categorical group, `smooth_l1` per scalar, in standard deviations; each
        with how many they are."""
        used = [image for image in regions if len(image) > 0]
        classes = torch.cat([image.gt_classes for image in used] or [raw.new_zeros(0, dtype=torch.int64)])
        values = torch.cat([image.gt_attribute_values for image in used] or [self.mirror.new_zeros(0, self.num_values)])
        scalars = torch.cat([image.gt_attribute_scalars for image in used] or [raw.new_zeros(0, self.num_scalars)])
        logits, numbers = self._channels(raw, classes).split([self.num_values, self.num_scalars], dim=1)
        known = (values != UNKNOWN) & self.free
        ticked, holds = logits[known], (values[known] == 1).to(logits.dtype)
        gamma, alpha = self.focal
        measured = torch.isfinite(scalars)
        targets = ((scalars.to(numbers.dtype) - self.mean) / self.std)[measured]
        chosen, count = self._cross_entropy(logits, values)
        parts = {
            "bce": (sigmoid_focal_loss(ticked, holds, alpha, gamma, reduction="sum"), len(ticked)),
            "ce": (chosen, count),
            "smooth_l1": (smooth_l1_loss(numbers[measured], targets, self.smooth_l1_beta, "sum"), len(targets)),
        }
        return {part: (loss, torch.tensor(float(number), device=raw.device)) for part, (loss, number) in parts.items()}

    @torch.jit.export
    def decode(self, raw: Tensor, boxes: Tensor, classes: Tensor, image_index: Tensor) -> dict[str, Tensor]:
        """See `grids`: nothing depends on the box."""
        return self.grids(raw, classes)

    def grids(self, raw: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """attribute_scores (R, V): softmax within a categorical group, sigmoid of others; attribute_scalars (R, S);
        both 0 where a group is not of the class."""
        parts = self._channels(raw, classes).split(self.sizes, dim=1)
        outputs: list[Tensor] = []
        for index, exclusive in enumerate(self.exclusive[:-1]):
            outputs.append(parts[index].softmax(dim=1) if exclusive else parts[index].sigmoid())
        outputs.append(parts[-1] * self.std + self.mean)
        both = torch.cat(outputs, dim=1)
        both = torch.where(self.belongs[classes], both, torch.zeros_like(both))
        return {"attribute_scores": both[:, : self.num_values], "attribute_scalars": both[:, self.num_values :]}

    @torch.jit.export
    def to_image(
        self, decoded: dict[str, Tensor], boxes: Tensor, scale: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """The same in every frame."""
        return {key: decoded[key] for key in ("attribute_scores", "attribute_scalars")}

    def unflip(self, raw: Tensor) -> Tensor:
        """Swaps values that `flip_pairs` name. ConfigError with `class_hidden`, where values come later."""
        if self.hidden is None:
            return raw[:, self.mirror]
        if not torch.equal(self.mirror, self.mirror.sort().values):
            raise ConfigError(
                f"tta.flip=true: tasks.{self.name}.class_hidden and flip_pairs of the vocabulary '{VOCABULARY}' do not "
                "go together; choose tta.flip=false"
            )
        return raw

    def _moments(self, measured: Sequence[Group], given: Mapping[str, Sequence[float]]) -> list[tuple[float, float]]:
        """Mean and standard deviation of each scalar group. ConfigError: of no such group, or malformed ones."""
        names = [group.name for group in measured]
        for name, pair in given.items():
            key = f"tasks.{self.name}.scalars.{name}"
            if name not in names:
                known = ", ".join(names) or "none"
                raise ConfigError(f"{key}: no such scalar group{suggest(name, names)}; there are {known}")
            if not isinstance(pair, list | tuple) or len(pair) != 2 or not are_numbers(pair) or pair[1] <= 0:
                raise ConfigError(f"{key}={short(pair)}: expected [mean, standard deviation above 0]")
        for group in measured:
            if group.name not in given and (group.mean, group.std) == (0.0, 1.0):
                logger.warning(
                    "the scalar attribute '%s' is not normalised: set tasks.%s.scalars.%s=[mean, standard deviation] "
                    "where these are far from 0 and 1",
                    *(group.name, self.name, group.name),
                )
        return [tuple(map(float, given.get(group.name, (group.mean, group.std)))) for group in measured]

    def _channels(self, raw: Tensor, classes: Tensor) -> Tensor:
        """(R, V + S) of (R,) classes, in float32."""
        if self.class_embedding is not None:
            raw = self.predictor(F.relu(raw + self.class_embedding(classes)))
        return full_precision(raw)

    def _cross_entropy(self, logits: Tensor, values: Tensor) -> tuple[Tensor, int]:
        """Sum over what is known of all categorical groups, and how much that is."""
        total, count = logits[:0].sum(), 0
        for group in self.groups:
            if group.kind == CATEGORICAL:
                truth = values[:, group.columns]
                known = torch.nonzero((truth != UNKNOWN).any(dim=1)).squeeze(1)
                own = logits[known][:, group.columns]
                total = total + F.cross_entropy(own, truth[known].argmax(dim=1), reduction="sum")
                count += len(known)
        return total, count


_TOGETHER = {"AP_iou_f1": 0, "AP_iou_f1_positive": 1, "AP_iou": None}
"""Metric -> which agreement of `label_f1` it needs."""


@dataclass(frozen=True)
class _Said:
    """What N rows say: boxes, their scores (N,), (N, V) probabilities and (N, S) scalars."""

    boxes: Located
    confidence: np.ndarray
    scores: np.ndarray
    scalars: np.ndarray

    def at(self, index: np.ndarray) -> _Said:
        return _Said(self.boxes.at(index), self.confidence[index], self.scores[index], self.scalars[index])


@dataclass(frozen=True)
class _Annotated:
    """G objects: boxes, (G, V) values and (G, S) scalars (see `Labels`), whether they are crowds, their ids."""

    boxes: Located
    values: np.ndarray
    scalars: np.ndarray
    crowd: np.ndarray
    ids: Sequence[Any]

    @property
    def known(self) -> np.ndarray:
        """(G,) bool: of which objects anything is known."""
        return any_known(self.values, self.scalars) & ~self.crowd

    def at(self, index: np.ndarray) -> _Annotated:
        ids = [self.ids[number] for number in index.tolist()]
        return _Annotated(self.boxes.at(index), self.values[index], self.scalars[index], self.crowd[index], ids)


def _found(encounter: Encounter) -> list[tuple[int, int]]:
    """Which detection found which object at an IoU of 0.5, whatever they are like."""
    found = find_objects(encounter, None, np.array([0.5]), np.zeros(1))[0, 0]
    hits = np.flatnonzero(found >= 0)
    return list(zip(encounter.detections[hits].tolist(), encounter.objects[found[hits]].tolist()))


def _sure(group: Group, probabilities: Sequence[float], threshold: float) -> Any:
    """A label of the group of which every part is at least as likely as `threshold`, None if there is none."""
    if group.kind == CATEGORICAL:
        best = max(probabilities)
        return group.values[list(probabilities).index(best)] if best >= threshold else None
    if any(max(probability, 1 - probability) < threshold for probability in probabilities):
        return None
    holds = [value for value, probability in zip(group.values, probabilities) if probability >= 0.5]
    return bool(holds) if group.kind == BINARY else holds


def _percent(share: float, reason: str | None = None) -> Metric:
    return Metric(100 * float(share), reason=reason)
