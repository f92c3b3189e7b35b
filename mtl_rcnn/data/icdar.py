"""Folders of images with `gt_<stem>.txt` beside them, as the ICDAR robust reading competitions give them.

    quadrilaterals  377,117,463,117,465,130,378,130,Genaxis Theatre   ICDAR 2015: x1,y1,...,x4,y4,transcription
    boxes           38, 43, 920, 215, "Tiredness"                     ICDAR 2013: left, top, right, bottom; or no commas

A transcription may hold commas, and all else but a line break; `###` says "do not care". A file may begin with a byte
order mark.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.faults import Fault, Sink
from mtl_rcnn.data.reader import DatasetReader, coco_data, image_entries
from mtl_rcnn.errors import ConfigError

DO_NOT_CARE = "###"

_NUMBER = r"\s*(-?\d+(?:\.\d+)?)\s*"
_FORMS = {
    "quadrilaterals": (re.compile(",".join([_NUMBER] * 8) + ",(.*)"), "x1,y1,x2,y2,x3,y3,x4,y4,transcription"),
    "boxes": (
        re.compile(r"(?:,|\s)".join([_NUMBER] * 4) + r'(?:,|\s)\s*"(.*)"\s*'),
        'left, top, right, bottom, "text"',
    ),
}


class IcdarFolder(DatasetReader):
    """Images by name, each with a field `text_lines` (see `tasks`) from its file; an image without one is not labelled.

    The files lie in the folders that the dataset names as `annotations`, or among the images.

    Args:
        form: of their lines: "quadrilaterals" (2015) or "boxes" (2013).
        pattern: of the images' names, such as "*.jpg"; None takes every image.
    """

    def __init__(self, form: str = "quadrilaterals", pattern: str | None = None) -> None:
        if form not in _FORMS:
            raise ConfigError(f"reader.form={form}: expected {' or '.join(_FORMS)}")
        self.form = form
        self.pattern = pattern

    def read(self, spec: DatasetSpec, report: Sink) -> CocoData:
        """An entry per image, ids from 1 in the order of the names: img_2 before img_10."""
        folder = Path(spec.images)
        folders = [Path(path) for path in spec.annotations] or [folder]
        for needed in (folder, *folders):
            if not needed.is_dir():
                report(Fault("folder missing", f"dataset {spec.name!r}: no folder {needed}", str(needed)))
                return coco_data(folder, ())
        entries = list(image_entries(folder, sorted(folder.glob(self.pattern or "*"), key=_in_order), report))
        for entry in entries:
            name = f"gt_{Path(entry['file_name']).stem}.txt"
            file = next((path / name for path in folders if (path / name).is_file()), None)
            if file is not None:
                entry["text_lines"] = list(read_lines(file, self.form, report))
        labelled = sum("text_lines" in entry for entry in entries)
        note = f"{labelled} of {len(entries)} images have a file gt_<name>.txt; the others are not labelled"
        return coco_data(folder, entries, notes=(note,) if labelled < len(entries) else ())


def read_lines(path: Path, form: str, report: Sink) -> Iterator[dict[str, Any]]:
    """Lines of a file as {"polygon": 8 numbers, "transcription": text, "ignore": bool}; a fault, with the file and the
    number of the line, for what is none."""
    try:
        content = path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        report(Fault("not UTF-8", f"{path}: is not UTF-8 text ({error}); save it as UTF-8", str(path)))
        return
    pattern, expected = _FORMS[form]
    for number, line in enumerate(re.split(r"\r?\n|\r", content), 1):
        if not line.strip():
            continue
        match = pattern.fullmatch(line)
        if match is None:
            text = f"{path}, line {number}: {line[:80]!r}; expected {expected} (reader.form: {form})"
            report(Fault("malformed line", text, str(path)))
            continue
        *numbers, transcription = match.groups()
        ignore = transcription.strip().strip('"') == DO_NOT_CARE
        yield {"polygon": _polygon([float(n) for n in numbers]), "transcription": transcription, "ignore": ignore}


def _polygon(numbers: list[float]) -> list[float]:
    if len(numbers) == 8:
        return numbers
    left, top, right, bottom = numbers
    return [left, top, right, top, right, bottom, left, bottom]


def _in_order(path: Path) -> list[Any]:
    """Numbers within a name by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", path.name)]
