"""Folders as the ICDAR competitions give them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.faults import Fault
from mtl_rcnn.data.reader import read_dataset
from mtl_rcnn.errors import ConfigError, DataError

READER = {"_target_": "mtl_rcnn.data.icdar.IcdarFolder"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Images 2, 10 and 11, the last without a file."""
    for number in (2, 10, 11):
        Image.fromarray(np.zeros((40, 60, 3), np.uint8)).save(tmp_path / f"img_{number}.jpg")
    (tmp_path / "gt_img_2.txt").write_bytes(
        b"\xef\xbb\xbf3,4,30,5,30,20,3,19,Caf\xc3\xa9, open\r\n1,2,9,2,9,8,1,8,###\r\n\r\n"
    )
    (tmp_path / "gt_img_10.txt").write_text("")
    return tmp_path


def spec(folder: Path, reader: dict, **fields) -> DatasetSpec:
    return DatasetSpec.from_config({"name": "words", "images": str(folder), "reader": reader, **fields})


def test_quadrilaterals(folder: Path) -> None:
    data = read_dataset(spec(folder, READER))
    second, tenth, eleventh = data.images.values()  # by number, not by letters
    assert second["file_name"] == "img_2.jpg"
    assert second["text_lines"] == [
        {"polygon": [3, 4, 30, 5, 30, 20, 3, 19], "transcription": "Café, open", "ignore": False},
        {"polygon": [1, 2, 9, 2, 9, 8, 1, 8], "transcription": "###", "ignore": True},
    ]
    assert tenth["text_lines"] == []
    assert "text_lines" not in eleventh
    assert data.notes == ("2 of 3 images have a file gt_<name>.txt; the others are not labelled",)
    (dataset,), _ = build_datasets([spec(folder, READER)], {})
    assert dataset.records[0]["text_lines"] == second["text_lines"]


def test_boxes_with_commas_and_without_in_a_folder_of_their_own(folder: Path, tmp_path: Path) -> None:
    files = tmp_path / "files"
    files.mkdir()
    (files / "gt_img_10.txt").write_text('38, 3, 50, 15, "Say "hi", you"\n1 2 9 8 "###"\n')
    data = read_dataset(spec(folder, READER | {"form": "boxes", "pattern": "img_10.*"}, annotations=str(files)))
    (image,) = data.images.values()
    assert image["text_lines"] == [
        {"polygon": [38, 3, 50, 3, 50, 15, 38, 15], "transcription": 'Say "hi", you', "ignore": False},
        {"polygon": [1, 2, 9, 2, 9, 8, 1, 8], "transcription": "###", "ignore": True},
    ]


def test_no_character_but_a_line_break_ends_a_line_and_do_not_care_may_be_dressed(folder: Path) -> None:
    text = '1,2,9,2,9,8,1,8,one\u2028word\x0c\r\n1,2,9,2,9,8,1,8,### \n1,2,9,2,9,8,1,8,"###"\n'
    (folder / "gt_img_2.txt").write_bytes(text.encode())
    lines = read_dataset(spec(folder, READER)).images[1]["text_lines"]
    assert [line["ignore"] for line in lines] == [False, True, True]
    assert lines[0]["transcription"] == "one\u2028word\x0c"


@pytest.mark.parametrize("line", ["1,2,3,4,5,6,7,word", "1,2,3,4,5,6,x,8,word", "1,2,3,4,5,6,7,8"])
def test_a_malformed_line_is_named(folder: Path, line: str) -> None:
    with (folder / "gt_img_2.txt").open("a") as file:
        file.write(f"{line}\n5,5,9,5,9,9,5,9,last\n")
    with pytest.raises(DataError, match=r"gt_img_2\.txt, line 4: .*expected x1,y1,x2,y2"):
        read_dataset(spec(folder, READER))
    faults: list[Fault] = []
    data = read_dataset(spec(folder, READER), faults.append)
    assert [fault.kind for fault in faults] == ["malformed line"]
    assert [line["transcription"] for line in data.images[1]["text_lines"]][-1] == "last"


def test_other_faults(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"gt_img_2\.txt, line 1: .*form: boxes"):
        read_dataset(spec(folder, READER | {"form": "boxes"}))
    with pytest.raises(ConfigError, match=r"reader\.form=words: expected quadrilaterals or boxes"):
        read_dataset(spec(folder, READER | {"form": "words"}))
    with pytest.raises(DataError, match=r"no folder .*elsewhere"):
        read_dataset(spec(folder, READER, annotations=str(tmp_path / "elsewhere")))
    (folder / "gt_img_2.txt").write_bytes(b"3,4,30,5,30,20,3,19,Caf\xe9\n")
    with pytest.raises(DataError, match=r"gt_img_2\.txt: is not UTF-8"):
        read_dataset(spec(folder, READER))


def test_real_files(coco_mini: Path) -> None:
    folder = coco_mini.parent / "icdar2015_toy"
    if not folder.is_dir():
        pytest.skip("no icdar2015_toy beside coco_mini")
    data = read_dataset(spec(folder, READER))
    assert [image["file_name"] for image in data.images.values()] == [f"img_{n}.jpg" for n in (1, 2, 3, 4, 5, 9, 10)]
    lines = [line for image in data.images.values() for line in image["text_lines"]]
    assert sum(not line["ignore"] for line in lines) == sum(line["transcription"] == "text" for line in lines) > 0
