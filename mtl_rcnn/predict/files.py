"""Files of results, written as they come: memory does not grow, and what was computed survives an error.

    coco   predictions/images_<task>.json  COCO results rows; images.json: id, file name, frame and size of every image
    jsonl  predictions/images.jsonl        a line per image: id, file name, frame, size, and the rows of every task
    csv    predictions/images_<task>.csv   a line per row; lists of up to four numbers take a column each

Rows are those of each task's evaluator; `category_id` is the index in classes.json. A list of more than four numbers
and what is no number is JSON within its cell. Files that are not line by line bear a temporary name until they are
complete.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from mtl_rcnn.errors import MtlRcnnError
from mtl_rcnn.evaluation.evaluator import Row

FORMATS = ("coco", "jsonl", "csv")
_WIDE = 4


class ResultFiles(AbstractContextManager):
    """Writes results into a folder's `predictions/`. A context: leaving it, also by an error, completes the files.

    Args:
        folder: the output directory.
        tasks: names of all tasks that have rows.
        form: one of `FORMATS`.

    Raises:
        MtlRcnnError: a file cannot be written.
    """

    def __init__(self, folder: Path, tasks: Sequence[str], form: str) -> None:
        self.folder = folder / "predictions"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise MtlRcnnError(f"{self.folder}: cannot be made: {error.strerror or error}") from error
        self._form = form
        self._whole = _Lines(self.folder / "images.jsonl") if form == "jsonl" else None
        self._images = _JsonList(self.folder / "images.json") if form == "coco" else None
        kind = {"coco": (_JsonList, "json"), "csv": (_Table, "csv")}.get(form)
        self._of_task = {
            task: kind[0](self.folder / f"images_{task}.{kind[1]}") for task in (tasks if kind is not None else ())
        }

    def add(self, image: Mapping[str, Any], rows: Mapping[str, Sequence[Row]]) -> None:
        """Writes the results of one image.

        Args:
            image: its id, file_name, frame, width and height.
            rows: of every task.
        """
        if self._whole is not None:
            self._whole.add({**image, **rows})
            return
        if self._images is not None:
            self._images.add(image)
        for task, file in self._of_task.items():
            for row in rows[task]:
                file.add(row)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for file in (self._whole, self._images, *self._of_task.values()):
            if file is not None:
                file.close()


class _Lines:
    """JSON line by line."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)

    def add(self, value: Any) -> None:
        self._file.write(_json(value) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


class _JsonList:
    """A JSON list, an element at a time; the file takes its name when it is closed."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._temporary = path.with_name(f".{path.name}.tmp")
        self._file = _open(self._temporary)
        self._lead = "["

    def add(self, value: Any) -> None:
        self._file.write(f"{self._lead}\n{_json(value)}")
        self._lead = ","

    def close(self) -> None:
        self._file.write("[]\n" if self._lead == "[" else "\n]\n")
        self._file.close()
        self._temporary.replace(self._path)


class _Table:
    """CSV under the columns of the first row."""

    def __init__(self, path: Path) -> None:
        self._file = _open(path)
        self._writer: csv.DictWriter | None = None

    def add(self, row: Row) -> None:
        cells: dict[str, Any] = {}
        for key, value in row.items():
            cells |= _cells(key, value)
        if self._writer is None:
            self._writer = csv.DictWriter(self._file, list(cells))
            self._writer.writeheader()
        self._writer.writerow(cells)

    def close(self) -> None:
        self._file.close()


def _cells(key: str, value: Any) -> dict[str, Any]:
    if isinstance(value, str | int | float) or value is None:
        return {key: value}
    if isinstance(value, list) and len(value) <= _WIDE and all(isinstance(item, int | float) for item in value):
        return {f"{key}_{index}": item for index, item in enumerate(value)}
    return {key: _json(value)}


def _json(value: Any) -> str:
    return json.dumps(value, allow_nan=False)


def _open(path: Path) -> TextIO:
    try:
        return path.open("w", encoding="utf-8", newline="")
    except OSError as error:
        raise MtlRcnnError(f"{path}: cannot be written: {error.strerror or error}") from error
