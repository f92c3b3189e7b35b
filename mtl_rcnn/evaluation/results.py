"""The files of an evaluation: results rows per dataset and task, metrics, and scoring a results file again.

    predictions/<dataset>_<task>.json   the rows, a JSON list as the task's community reads it
    predictions/<dataset>_<task><...>   the same in other forms, if the task has any (`Evaluator.files`)
    metrics.json                        {"dataset/task/metric": float}
    metrics_info.json                   {"dataset/task/metric": {"higher_is_better": bool, "reason": text or null}}
    evaluated.json                      {"iteration": int}: the network, by the steps it was trained for; null: unknown

Every file is written under a temporary name, then renamed: a reader never sees half of one.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_rcnn.data.target import Record
from mtl_rcnn.errors import DataError, MtlRcnnError
from mtl_rcnn.evaluation.evaluator import THRESHOLD, Evaluator, Metric, Row

_EVALUATED = "evaluated.json"

NO_FILES: Mapping[str, bytes] = {}


def write_predictions(
    folder: Path, dataset: str, task: str, rows: Sequence[Row], others: Mapping[str, bytes] = NO_FILES
) -> Path:
    """Writes `predictions/<dataset>_<task>.json` into the folder, and the same in other forms (ending of the name ->
    content); returns the JSON's path."""
    path = folder / "predictions" / f"{dataset}_{task}.json".replace(os.sep, "_")
    write_json(path, list(rows), indent=None)
    for ending, content in others.items():
        _write(path.with_name(path.stem + ending), content)
    return path


def write_metrics(folder: Path, metrics: Mapping[str, Metric], iteration: int | None = None) -> None:
    """Writes `metrics.json` (values), `metrics_info.json` (direction and reason) and `evaluated.json` into the
    folder."""
    info = {
        key: {"higher_is_better": metric.higher_is_better, "reason": metric.reason} for key, metric in metrics.items()
    }
    write_json(folder / "metrics_info.json", info)
    (folder / _EVALUATED).unlink(missing_ok=True)  # it never names another network than the metrics are of
    write_json(folder / "metrics.json", {key: metric.value for key, metric in metrics.items()})
    write_json(folder / _EVALUATED, {"iteration": iteration})


def read_thresholds(folder: Path, iteration: int) -> dict[str, dict[str, dict[str, float]]]:
    """{dataset: {task: {class: score threshold of highest F1}}} of a folder's `metrics.json`; {} unless that file is
    of the network of this iteration."""
    path = folder / _EVALUATED
    if not path.is_file() or _read_json(path).get("iteration") != iteration:
        return {}
    found: dict[str, dict[str, dict[str, float]]] = {}
    for key, value in _read_json(folder / "metrics.json").items():
        dataset, task, name = key.split("/", 2)
        if name.startswith(f"{THRESHOLD}/"):
            found.setdefault(dataset, {}).setdefault(task, {})[name.split("/", 1)[1]] = value
    return found


def read_metrics(folder: Path) -> dict[str, Metric]:
    """Inverse of `write_metrics`."""
    values, info = _read_json(folder / "metrics.json"), _read_json(folder / "metrics_info.json")
    return {key: Metric(value, **info[key]) for key, value in values.items()}


def evaluate_rows(evaluator: Evaluator, path: Path | str) -> dict[str, Metric]:
    """Metrics of a results file on the evaluator's dataset.

    Raises:
        DataError: the file is missing, is not a JSON list, or has a row that the dataset or the task cannot read; names
            the file, the first offending row's index and what was expected.
    """
    rows = read_rows(path, evaluator)
    try:
        return dict(evaluator.metrics(rows))
    except DataError as error:
        raise DataError(f"{path}: {error}") from error


def read_rows(path: Path | str, evaluator: Evaluator) -> list[Row]:
    """Rows of a results file, each an object with the id of an image of the evaluator's dataset. Raises DataError."""
    rows = _read_json(Path(path))
    if not isinstance(rows, list):
        raise DataError(f"{path}: expected a JSON list of results rows, got {_kind(rows)}")
    known = {record["image_id"] for record in evaluator.records}
    for index, row in enumerate(rows):
        if not isinstance(row, dict) or not isinstance(row.get("image_id"), (int, str)):
            raise DataError(f"{path}: row {index}: expected an object with 'image_id', got {str(row)[:60]}")
        if row["image_id"] not in known:
            raise DataError(f"{path}: row {index}: {_unknown_image(row['image_id'], rows, known, evaluator.records)}")
    return rows


def _unknown_image(image_id: Any, rows: Sequence[Any], known: set[Any], records: Sequence[Record]) -> str:
    shown = ", ".join(repr(record["image_id"]) for record in records[:3])
    named = {row["image_id"] for row in rows if isinstance(row, dict) and isinstance(row.get("image_id"), (int, str))}
    return (
        f"image_id {image_id!r} is not in the dataset; it has {len(known)} images such as {shown}."
        f" {len(named & known)}/{len(named)} of the file's image ids are in the dataset:"
        " is this file of another dataset or split?"
    )


def write_json(path: Path, value: Any, *, indent: int | None = 2) -> None:
    """Writes strict JSON (no nan) under a temporary name and renames it. Creates the folder.

    Raises:
        ValueError: a number is not finite, naming the file.
        MtlRcnnError: the file cannot be written.
    """
    try:
        text = json.dumps(value, indent=indent, allow_nan=False)
    except ValueError as error:
        raise ValueError(f"{path}: not written: {error}") from error
    write_text(path, text + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a text file under a temporary name and renames it. Creates the folder.

    Raises:
        MtlRcnnError: the file cannot be written.
    """
    _write(path, text.encode("utf-8"))


def _write(path: Path, content: bytes) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise MtlRcnnError(f"{path}: cannot be written: {error.strerror or error}") from error


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error}); expected a COCO-style results list") from error


def _kind(value: Any) -> str:
    if isinstance(value, dict):
        return f"an object with the keys {', '.join(list(value)[:4])} (is this an annotation file?)"
    return type(value).__name__
