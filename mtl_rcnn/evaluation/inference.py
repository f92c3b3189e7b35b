"""Runs a network over datasets on all ranks, gathers the rows on rank 0, scores them and writes the files."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from detectron2.utils import comm
from torch import nn

from mtl_rcnn.data.target import GivenBoxes, Prediction, Record, Sample
from mtl_rcnn.errors import DataError, MtlRcnnError, StepError
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row, Scored
from mtl_rcnn.evaluation.progress import Progress
from mtl_rcnn.evaluation.results import write_metrics, write_predictions

logger = logging.getLogger(__name__)

_LEAST_SIDE = 0.01
"""Pixels. On the way to the network's frame and back, rounding must not leave nothing of an annotated box."""

_Seen = list[tuple[int, dict[str, list[Row]]]]
"""(record index, rows by task) per image in the order one rank saw them."""


@dataclass(frozen=True)
class EvaluationSet:
    """One dataset to evaluate on.

    Attributes:
        name: the dataset's name, first part of its metrics' keys.
        loader: this rank's batches. Over all ranks, each record of the dataset occurs exactly once.
        evaluators: task name -> evaluator; all hold the same records.
        labelled: this rank's batches of the same records with labels, for losses; None if nobody asks for these.
    """

    name: str
    loader: Iterable[Sequence[Sample]]
    evaluators: Mapping[str, Evaluator]
    labelled: Iterable[Sequence[Sample]] | None = None


Inspector = Callable[[EvaluationSet, str, Scored], Mapping[str, Metric]]
"""Sees what a task scored on a dataset, on rank 0, and returns the metrics to keep: the same, or with more reason."""


def evaluate(
    model: nn.Module,
    sets: Sequence[EvaluationSet],
    output_dir: Path | None = None,
    *,
    inspect: Inspector | None = None,
    iteration: int | None = None,
) -> dict[str, Metric]:
    """Metrics "dataset/task/metric" on rank 0, {} on others. Every rank must call this.

    With `output_dir`, rank 0 writes the files that `evaluation.results` describes; they exist when this returns.

    Args:
        inspect: see `Inspector`.
        iteration: of the network, for the files.
    """
    metrics: dict[str, Metric] = {}
    for entry in sets:
        rows = predict_dataset(model, entry.loader, entry.evaluators, name=entry.name)
        if rows is not None:
            metrics.update(_score(entry, rows, output_dir, inspect))
    if output_dir is not None and comm.is_main_process():
        write_metrics(output_dir, metrics, iteration)
    comm.synchronize()
    return metrics


def predict_dataset(
    model: nn.Module,
    loader: Iterable[Sequence[Sample]],
    evaluators: Mapping[str, Evaluator],
    *,
    name: str = "dataset",
) -> dict[str, list[Row]] | None:
    """Results rows by task, in the order of the records and then of the predictions; None on ranks other than 0.

    The network runs in evaluation mode without gradients; every module's own mode is restored afterwards.

    Images that a loader left out as unreadable (its `excluded`, see `data.loader`) count as images without detections.

    Where an evaluator asks for it (`on_truth`), the network also describes the annotated boxes, from the same features:
    `model.predict_with_given`, of `MultiTaskRCNN` and of `MultiViewNetwork`, is called in place of `model`.

    Raises:
        DataError: a sample that is not of the dataset, or, on rank 0, images that were seen twice or never.
    """
    records = _shared_records(evaluators)
    share = math.ceil(len(records) / comm.get_world_size())
    with Progress(f"evaluating {name}", share, enabled=comm.is_main_process()) as progress:
        seen = list(_predict(model, loader, evaluators, records, progress, name))
    excluded = {exclusion.image_id for exclusion in getattr(loader, "excluded", {}).values()}
    gathered: list[tuple[_Seen, set[Any]]] = comm.gather((seen, excluded), dst=0)
    if not comm.is_main_process():
        return None
    excluded = set().union(*(ids for _, ids in gathered))
    by_record = _once_each([item for part, _ in gathered for item in part], records, excluded, name)
    return {task: [row for rows in by_record for row in rows.get(task, ())] for task in evaluators}


@contextmanager
def evaluation_mode(model: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; afterwards each module has the mode it had, also where they differ."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes.items():
            module.training = mode


def _predict(
    model: nn.Module,
    loader: Iterable[Sequence[Sample]],
    evaluators: Mapping[str, Evaluator],
    records: Sequence[Record],
    progress: Progress,
    name: str,
) -> Iterator[tuple[int, dict[str, list[Row]]]]:
    index_of = {record["image_id"]: index for index, record in enumerate(records)}
    on_truth = any(evaluator.on_truth for evaluator in evaluators.values())
    with evaluation_mode(model):
        for batch in loader:
            indices = [index_of.get(sample["image_id"]) for sample in batch]
            if None in indices:
                image_id = batch[indices.index(None)]["image_id"]
                raise DataError(f"dataset '{name}': the loader gave image {image_id!r}, which is not in it")
            with _described(batch, name):
                if on_truth:
                    looked_at = [_with_truth(records[index]) for index in indices]
                    found, described = model.predict_with_given(batch, [given for _, given in looked_at])
                else:
                    found = model(batch)
            for place, (index, prediction) in enumerate(zip(indices, found, strict=True)):
                record, on_cpu = records[index], _to_cpu(prediction)
                rows = {task: evaluator.rows(record, on_cpu) for task, evaluator in evaluators.items()}
                if on_truth:
                    annotations, of_truth = looked_at[place][0], _to_cpu(described[place])
                    for task, evaluator in evaluators.items():
                        if evaluator.on_truth:
                            rows[task] = [*rows[task], *evaluator.truth_rows(record, annotations, of_truth)]
                yield index, rows
            progress.advance(len(batch))


@contextmanager
def _described(batch: Sequence[Sample], dataset: str) -> Iterator[None]:
    """Says of an error that nobody foresaw with which images it came."""
    try:
        yield
    except MtlRcnnError:
        raise
    except Exception as error:
        images = ", ".join(repr(sample["image_id"]) for sample in batch)
        raise StepError(f"evaluating dataset {dataset!r}: {type(error).__name__}: {error}; images: {images}") from error


def _with_truth(record: Record) -> tuple[list[Mapping[str, Any]], GivenBoxes]:
    """The annotations whose boxes can be looked at, and these boxes, clipped to the image."""
    objects = [entry for entry in record["annotations"] if not entry["iscrowd"] and "bbox" in entry]
    boxes = torch.tensor([entry["bbox"] for entry in objects], dtype=torch.float64).reshape(-1, 4)
    limit = torch.tensor([record["width"], record["height"]] * 2, dtype=torch.float64)
    corners = torch.minimum(torch.cat([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], dim=1).clamp(min=0), limit)
    seen = (corners[:, 2:] - corners[:, :2] >= _LEAST_SIDE).all(dim=1)
    kept = [entry for entry, is_seen in zip(objects, seen.tolist()) if is_seen]
    classes = torch.tensor([entry["category_id"] for entry in kept], dtype=torch.int64)
    return kept, GivenBoxes(corners[seen].float(), classes)


def _to_cpu(prediction: Prediction) -> Prediction:
    return {key: value.detach().cpu() for key, value in prediction.items()}


def _shared_records(evaluators: Mapping[str, Evaluator]) -> Sequence[Record]:
    if not evaluators:
        raise ValueError("evaluation needs at least one evaluator")
    return next(iter(evaluators.values())).records


def _once_each(seen: _Seen, records: Sequence[Record], excluded: set[Any], name: str) -> list[dict[str, list[Row]]]:
    """Rows by task per record. A loader that pads ranks to equal length, or drops a rest, would falsify the metrics."""
    by_index: dict[int, dict[str, list[Row]]] = {}
    twice = []
    for index, rows in seen:
        if index in by_index:
            twice.append(records[index]["image_id"])
        by_index[index] = rows
    missing = [record["image_id"] for index, record in enumerate(records) if index not in by_index]
    never = [image_id for image_id in missing if image_id not in excluded]
    if len(missing) > len(never):
        left_out = [image_id for image_id in missing if image_id in excluded]
        logger.warning("%s: unreadable images %s count as images without detections", name, _some(left_out))
    if twice or never:
        raise DataError(
            f"dataset '{name}': of {len(records)} images, {_some(never)} never evaluated and {_some(twice)} evaluated"
            " more than once; each must be seen exactly once (unique image ids, a loader that neither pads nor drops)"
        )
    return [by_index.get(index, {}) for index in range(len(records))]


def _some(image_ids: Sequence[Any]) -> str:
    shown = ", ".join(repr(image_id) for image_id in image_ids[:3])
    return f"{len(image_ids)}" + (f" ({shown}{' ...' if len(image_ids) > 3 else ''})" if image_ids else "")


def _score(
    entry: EvaluationSet,
    rows: Mapping[str, Sequence[Row]],
    output_dir: Path | None,
    inspect: Inspector | None,
) -> dict[str, Metric]:
    metrics = {}
    for task in entry.evaluators:
        if output_dir is not None:
            others = entry.evaluators[task].files(rows[task])
            write_predictions(output_dir, entry.name, task, rows[task], others)
        start = time.monotonic()
        found = score_task(entry, task, rows[task], inspect)
        logger.info("%s/%s: %d rows scored in %.1f s", entry.name, task, len(rows[task]), time.monotonic() - start)
        metrics.update(found)
    return metrics


def score_task(
    entry: EvaluationSet, task: str, rows: Sequence[Row], inspect: Inspector | None = None
) -> dict[str, Metric]:
    """Metrics "dataset/task/metric" of one task's rows on one dataset."""
    scored = entry.evaluators[task].score(rows)
    metrics = scored.metrics if inspect is None else inspect(entry, task, scored)
    return {f"{entry.name}/{task}/{name}": _finite(metric, task, name) for name, metric in metrics.items()}


def _finite(metric: Metric, task: str, name: str) -> Metric:
    if not math.isfinite(metric.value):
        raise ValueError(
            f"the evaluator of '{task}' gave {name} = {metric.value}; a metric is finite, or 0 with a reason"
        )
    return metric
