"""Semantic segmentation: one class per pixel, things and background alike.

Labels are 8 or 16 bit files of one value per pixel, named by `sem_seg_file_name`: the dataset's own ids of the
vocabulary `sem_seg_classes`. A value of its own says that nothing is known of a pixel.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from faster_coco_eval import mask as mask_api
from torch import Tensor
from torch.nn import functional as F

from mtl_rcnn.data.faults import Fault, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_map import find_fault, is_labelled, label_fault, read_map
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, ImageTarget, Prediction, Record, Sample, WrittenLabel
from mtl_rcnn.errors import DataError
from mtl_rcnn.evaluation.coco_rows import encode_masks
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row
from mtl_rcnn.modeling.dense import build_decoder, enlarge, in_image_frame
from mtl_rcnn.modeling.slots import DecodedView, ImageTask, LossParts, Output, full_precision
from mtl_rcnn.visualize.canvas import BLACK, Canvas, color_of

FIELD = "sem_seg_file_name"
VOCABULARY = "sem_seg_classes"
UNKNOWN = -1
"""Of a pixel: nothing is known of it."""
_NO_CLASS = -2
_LEGEND = 6


class SemanticTarget(ImageTarget):
    """A map of classes per image.

    Args:
        name, label_space: see `Target`.
        ignore_label: value of the files where nothing is known; such pixels neither train nor are scored. None: every
            pixel has a class.
    """

    covers = True

    def __init__(self, name: str, label_space: LabelSpace, ignore_label: int | None) -> None:
        super().__init__(name, label_space)
        self.classes = [entry["name"] for entry in label_space.vocabulary(VOCABULARY, name)]
        self.ignore_label = ignore_label

    def check(self, record: Record) -> Coverage:
        """Looks at the file's head alone. DataError: it is declared and missing, no image of one value per pixel, or of
        another size than its image; the dataset does not say what the values mean, or gives a class no usable id."""
        labelled = is_labelled(record, FIELD, self.declared(record))
        if labelled and (fault := find_fault(record, FIELD, self.name) or _ids_fault(record, self.ignore_label)):
            refuse(fault)
        return Coverage(image=labelled)

    def faults(self, record: Record) -> Iterator[Fault]:
        """What `check` refuses; files that cannot be decoded, or hold a value that is no class."""
        if not is_labelled(record, FIELD, self.declared(record)):
            return
        if fault := find_fault(record, FIELD, self.name) or _ids_fault(record, self.ignore_label):
            yield fault
            return
        try:
            read_classes(record, self.name, self.ignore_label)
        except DataError as error:
            yield Fault("class map", str(error), record[FIELD], record["image_id"])

    def load(self, record: Record, geometry: Geometry) -> dict[str, Tensor] | None:
        """`classes`: (H, W) int16 index of the network's class, -1 where nothing is known; `labelled`: (C,) bool, the
        classes that the dataset has. DataError: see `faults`."""
        if not is_labelled(record, FIELD, self.declared(record)):
            return None
        classes = geometry.raster(read_classes(record, self.name, self.ignore_label), fill=UNKNOWN)
        labelled = torch.zeros(len(self.classes), dtype=torch.bool)
        labelled[list(_index_of(record).values())] = True
        return {"classes": torch.from_numpy(classes), "labelled": labelled}

    def as_prediction(self, sample: Sample) -> Prediction:
        """sem_seg (H, W) int64, -1 where nothing is known."""
        if not sample["labelled"].get(self.name) or self.name not in sample["targets"]:
            return {"sem_seg": torch.full(sample["image"].shape[-2:], UNKNOWN, dtype=torch.int64)}
        return {"sem_seg": sample["targets"][self.name]["classes"].long()}

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel | None:
        """A map of the dataset's own ids; `ignore_label` where the highest probability is below `threshold`, or the
        dataset has no such class. None where that is everywhere, or where it is somewhere and there is no
        `ignore_label`."""
        ids = {index: own for own, index in _index_of(record).items()}
        table = np.array([ids.get(index, UNKNOWN) for index in range(len(self.classes))])
        values = table[prediction["sem_seg"].cpu().numpy()]
        values[prediction["sem_seg_confidence"].cpu().numpy() < threshold] = UNKNOWN
        unknown = values == UNKNOWN
        if unknown.all() or (unknown.any() and self.ignore_label is None):
            return None
        values[unknown] = self.ignore_label
        return WrittenLabel(maps={FIELD: values.astype(np.uint8 if values.max() < 256 else np.uint16)})

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """A colour per class over the image, black where nothing is known, and the names of the largest classes."""
        classes = prediction["sem_seg"].cpu().numpy()
        sizes = np.bincount(classes[classes >= 0], minlength=len(self.classes))
        if not sizes.any():
            return
        colors = np.array([*(color_of(index) for index in range(len(self.classes))), BLACK], dtype=np.uint8)
        canvas.raster(colors[classes])
        for index in np.argsort(-sizes, kind="stable")[:_LEGEND]:
            if sizes[index] > 0:
                canvas.caption(f"{self.classes[index]} {100 * sizes[index] / classes.size:.0f} %", color_of(index))


class SemanticEvaluator(Evaluator):
    """Scores from one confusion matrix over all labelled pixels of the set.

    Rows are COCO's of its stuff results: one per image and class that was predicted somewhere in it, with a run-length
    mask; masks of one image do not overlap. A pixel that no row covers (so one of a class that the dataset lacks) is
    wrong for its true class and for no other.

    Args:
        name, label_space, records: see `Evaluator`.
        ignore_label: see `SemanticTarget`.
    """

    headline = "mIoU"

    def __init__(self, name: str, label_space: LabelSpace, records: Sequence[Record], ignore_label: int | None) -> None:
        super().__init__(name, label_space, records)
        self.names = [entry["name"] for entry in label_space.vocabulary(VOCABULARY, name)]
        self.ignore_label = ignore_label

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """COCO stuff rows; `category_id` is the dataset's own id of the class, or the network's index where the record
        tells of none."""
        classes = prediction["sem_seg"]
        ids = {index: own for own, index in _index_of(record).items()}
        sizes = torch.bincount(classes[classes >= 0])  # faster than `unique`, which sorts the pixels
        found = [index for index in sizes.nonzero().flatten().tolist() if index in ids or not ids]
        masks = encode_masks(classes[None] == torch.tensor(found, dtype=classes.dtype)[:, None, None])
        return [
            {"image_id": record["image_id"], "category_id": ids.get(index, index), "segmentation": mask}
            for index, mask in zip(found, masks, strict=True)
        ]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """In percent: `mIoU`, `pixel_accuracy`, `mean_accuracy`, `fwIoU` (classes weighted by their pixels), and
        `IoU/<class>`.

        Means are over the classes that occur in the set's ground truth; others do not count, but pixels that are taken
        for them do, as wrong. DataError: a row of another form, or overlapping masks.
        """
        confusion = self.confusion(rows)
        reason = None if rows else "no predictions"
        if not confusion.any():
            reason = "no image of the set is labelled for this task"
        return confusion_metrics(confusion, self.names, reason)

    def confusion(self, rows: Sequence[Row]) -> np.ndarray:
        """(C, C + 1) int64 pixels by true class and predicted class, the last column for none. DataError: see
        `metrics`."""
        by_image: dict[Any, list[tuple[int, Row]]] = {}
        for number, row in enumerate(rows):
            by_image.setdefault(row["image_id"], []).append((number, row))
        size = len(self.names)
        confusion = np.zeros((size, size + 1), dtype=np.int64)
        for record in self.records:
            if is_labelled(record, FIELD, self._declared(record)):
                truth = read_classes(record, self.name, self.ignore_label)
                predicted = _from_rows(record, by_image.get(record["image_id"], ()), size)
                confusion += confusion_matrix(truth, predicted, size)
        return confusion

    def _declared(self, record: Record) -> bool | None:
        return None if record["tasks"] is None else self.name in record["tasks"]


class SemanticTask(ImageTask):
    """A decoder and cross-entropy over the pixels.

    The loss of a pixel is taken over the classes that its dataset labels: where two datasets have different classes,
    none of them says of the other's that they are not there. At test time all classes compete.

    Args:
        name, label_space, features: see `Task`.
        decoder: see `build_decoder`.
    """

    target_class = SemanticTarget
    evaluator_class = SemanticEvaluator
    loss_parts = ("ce",)
    detectron2_names = {
        "sem_seg_head.predictor.": "image_tasks.{name}.decoder.predictor.",
        "sem_seg_head.": "image_tasks.{name}.decoder.scales.",
    }

    def __init__(
        self, name: str, label_space: LabelSpace, features: Mapping[str, ShapeSpec], *, decoder: Mapping[str, Any]
    ) -> None:
        super().__init__(name, label_space, features)
        self.classes = [str(entry["name"]) for entry in label_space.vocabulary(VOCABULARY, name)]
        self.decoder = build_decoder(len(self.classes), features, f"tasks.{name}.decoder", **decoder)
        self.stride = self.decoder.stride

    def outputs(self) -> list[Output]:
        """A map of the image's size."""
        return [Output("sem_seg", "(H, W)", "int64", f"class of every pixel, index into `{VOCABULARY}`")]

    def manifest(self) -> dict[str, Any]:
        """Names of the classes, in the order of the indices."""
        return {VOCABULARY: self.classes}

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(B, C, h, w) logits of cells of `stride` pixels, of the padded network frame."""
        return self.decoder(features)

    def losses(
        self, raw: Tensor, targets: list[dict[str, Tensor]], image_sizes: Sequence[tuple[int, int]]
    ) -> LossParts:
        """`ce`: cross-entropy summed over the labelled pixels of the network frame, padding excluded, and their
        number. Logits are enlarged to the frame first (bilinear), as in Detectron2's `SemSegFPNHead`."""
        total, count = full_precision(raw[:0]).sum(), 0
        for logits, target, (height, width) in zip(raw, targets, image_sizes, strict=True):
            classes = target["classes"].to(raw.device).long()
            pixels = enlarge(full_precision(logits), self.stride, height, width)
            labelled = target["labelled"].to(raw.device)
            if not bool(target["labelled"].all()):
                place = torch.where(labelled, labelled.cumsum(dim=0) - 1, torch.full_like(classes[0, :1], UNKNOWN))
                pixels, classes = pixels[labelled], torch.where(classes >= 0, place[classes], classes)
            total = total + F.cross_entropy(pixels[None], classes[None], ignore_index=UNKNOWN, reduction="sum")
            count += int((target["classes"] >= 0).sum())
        return {"ce": (total, torch.tensor(float(count), device=raw.device))}

    @torch.jit.export
    def decode(self, raw: Tensor, padded_size: Tensor) -> dict[str, Tensor]:
        """class_logits (B, C, h, w), float."""
        return {"class_logits": raw.float()}

    @torch.jit.export
    def to_image(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """sem_seg (H, W) int64: the class of the highest logit, after resizing."""
        logits = in_image_frame(decoded["class_logits"], self.stride, network_size, image_size)
        return {"sem_seg": logits.argmax(dim=0)}

    def to_label(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """`to_image`, and sem_seg_confidence (H, W): the class's probability."""
        logits = in_image_frame(decoded["class_logits"], self.stride, network_size, image_size)
        confidence, classes = logits.softmax(dim=0).max(dim=0)
        return {"sem_seg": classes, "sem_seg_confidence": confidence}

    def merge_views(self, views: list[DecodedView], image_size: Tensor) -> dict[str, Tensor]:
        """sem_seg (H, W) int64: the class of the highest mean probability over the views."""
        mean = torch.zeros(())
        for view in views:
            logits = in_image_frame(view.decoded["class_logits"], self.stride, view.network_size, image_size)
            probabilities = logits.softmax(dim=0) if len(views) > 1 else logits
            mean = mean.to(logits) + (probabilities.flip(2) if view.mirrored else probabilities)
        return {"sem_seg": mean.argmax(dim=0)}


def read_classes(record: Record, task: str, ignore_label: int | None) -> np.ndarray:
    """(H, W) int16 of a labelled image: index of the network's class, -1 where nothing is known.

    Raises:
        DataError: see `label_map.read_map`; the dataset does not say what the values mean, or a value means nothing.
    """
    if fault := _ids_fault(record, ignore_label):
        refuse(fault)
    index, values = _index_of(record), read_map(record, FIELD, task)
    if values.dtype.kind not in "iu" or values.min() < 0 or values.max() > np.iinfo(np.uint16).max:
        text = f"values from {values.min():g} to {values.max():g} of {values.dtype}: expected class ids of 8 or 16 bits"
        refuse(label_fault("class map of no classes", text, record, record[FIELD]))
    table = np.full(1 + np.iinfo(np.uint16).max, _NO_CLASS, dtype=np.int16)
    table[list(index)] = list(index.values())
    if ignore_label is not None:
        table[ignore_label] = UNKNOWN
    classes = table[values]
    if (classes == _NO_CLASS).any():
        found = ", ".join(map(str, np.unique(values[classes == _NO_CLASS])[:5]))
        text = (
            f"{(classes == _NO_CLASS).sum()} pixels have the class id {found}: expected ids of '{VOCABULARY}' "
            f"({_some(list(index))}) or {ignore_label} for unknown"
        )
        refuse(label_fault("unknown class id", text, record, record[FIELD]))
    return classes


def _ids_fault(record: Record, ignore_label: int | None) -> Fault | None:
    """What is wrong with the ids that the dataset gives its classes."""
    index = _index_of(record)
    odd = [key for key in index if type(key) is not int or not 0 <= key <= np.iinfo(np.uint16).max]
    if not index:
        what = "nothing says what its values mean"
    elif odd:
        what = f"a class has the id {odd[0]!r}, expected a whole number from 0 to {np.iinfo(np.uint16).max}"
    elif ignore_label in index:
        what = f"id {ignore_label} is also `ignore_label`"
    else:
        return None
    text = f"{what}: list the dataset's classes with their ids in its vocabulary '{VOCABULARY}'"
    return label_fault("class map without classes", text, record, record[FIELD])


def confusion_matrix(truth: np.ndarray, predicted: np.ndarray, classes: int) -> np.ndarray:
    """(C, C + 1) int64 pixels by true class and predicted class, the last column for none.

    Args:
        truth, predicted: (H, W) integers, class indices or negative; where `truth` is negative a pixel does not count.
        classes: C.
    """
    # One row more, for what is not known: cheaper than to pick the pixels that are.
    rows = np.where(truth >= 0, truth, classes).astype(np.int64)
    cells = rows * (classes + 1) + np.where(predicted >= 0, predicted, classes)
    counted = np.bincount(cells.ravel(), minlength=(classes + 1) ** 2)
    return counted.reshape(classes + 1, classes + 1)[:classes]


def confusion_metrics(confusion: np.ndarray, names: Sequence[str], reason: str | None = None) -> dict[str, Metric]:
    """Metrics of a (C, C + 1) confusion matrix, see `SemanticEvaluator.metrics`."""
    hits, truth = np.diag(confusion).astype(float), confusion.sum(axis=1).astype(float)
    union = truth + confusion[:, :-1].sum(axis=0) - hits
    there = truth > 0
    iou = np.divide(hits, union, out=np.zeros_like(hits), where=there)
    recall = np.divide(hits, truth, out=np.zeros_like(hits), where=there)
    whole = {
        "mIoU": iou[there].mean() if there.any() else 0.0,
        "pixel_accuracy": hits.sum() / max(truth.sum(), 1),
        "mean_accuracy": recall[there].mean() if there.any() else 0.0,
        "fwIoU": (iou * truth).sum() / max(truth.sum(), 1),
    }
    metrics = {name: Metric(100 * float(value), reason=reason) for name, value in whole.items()}
    for index, name in enumerate(names):
        absent = None if there[index] else "not in the ground truth of this set: counts in no mean"
        metrics[f"IoU/{name}"] = Metric(100 * float(iou[index]), reason=reason or absent)
    return metrics


def _from_rows(record: Record, rows: Sequence[tuple[int, Row]], classes: int) -> np.ndarray:
    """(H, W) int16 class indices of one image's rows, -1 where there is none."""
    index, size = _index_of(record), [record["height"], record["width"]]
    predicted = np.full(size, UNKNOWN, dtype=np.int16, order="F")  # as run lengths go: down the columns
    for number, row in rows:
        where = f"row {number} (image {record['image_id']})"
        if row.get("category_id") not in index:
            raise DataError(f"{where}: category_id {row.get('category_id')!r}; expected one of {_some(list(index))}")
        mask = _decoded(row.get("segmentation"), size, where)
        if (mask & (predicted >= 0)).any():
            raise DataError(f"{where}: its mask overlaps another one of the image; a pixel has one class")
        np.copyto(predicted, index[row["category_id"]], where=mask)
    return np.ascontiguousarray(predicted)


def _decoded(mask: Any, size: list[int], where: str) -> np.ndarray:
    if not isinstance(mask, Mapping) or list(mask.get("size", ())) != size or not isinstance(mask.get("counts"), str):
        found = f"size {mask.get('size')}" if isinstance(mask, Mapping) else repr(mask)[:40]
        raise DataError(f"{where}: 'segmentation' is {found}; expected an RLE {{'size': {size}, 'counts': text}}")
    try:
        return mask_api.decode(dict(mask)).view(bool)
    except (RuntimeError, ValueError) as error:
        raise DataError(f"{where}: 'segmentation' has counts that cannot be decoded ({error})") from error


def _index_of(record: Record) -> Mapping[int, int]:
    """The dataset's id of a class -> the network's index of it; {} where the record tells of none."""
    return record.get("vocabularies", {}).get(VOCABULARY, {})


def _some(ids: Sequence[Any]) -> str:
    return ", ".join(map(str, ids[:12])) + (f" ... ({len(ids)} in all)" if len(ids) > 12 else "")
