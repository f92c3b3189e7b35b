"""Records in a memory file: they come back as they were, and the ranks of a machine hold one copy."""

from __future__ import annotations

import json
import os
import pickle
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf
from ranks import ROOT, run_ranks
from toy import Toy

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.record_store import RecordStore
from mtl_rcnn.data.target import Record

RECORDS: list[Record] = [
    {"file_name": f"{i}.png", "tasks": None, "classes": (0, i), "annotations": [{"id": i, "bbox": [0.5, i, 2, 3]}]}
    for i in range(5)
]


def _mapped() -> set[str]:
    """The memory files of records that this process maps."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    return {line.split()[5] for line in lines if "mtl_rcnn_records" in line}


def test_a_store_gives_back_what_it_got() -> None:
    store = RecordStore(iter(RECORDS))
    assert list(store) == RECORDS
    assert (len(store), store[-1], store[1:4], store[::-2]) == (5, RECORDS[-1], RECORDS[1:4], RECORDS[::-2])
    assert len(RecordStore([])) == 0
    with pytest.raises(IndexError):
        store[5]


def test_what_is_done_to_a_record_does_not_reach_the_store() -> None:
    store = RecordStore(RECORDS)
    store[0]["annotations"].clear()
    assert store[0] == RECORDS[0]


def test_a_store_weighs_what_its_records_do() -> None:
    pickled = sum(len(pickle.dumps(record, pickle.HIGHEST_PROTOCOL)) for record in RECORDS)
    assert RecordStore(RECORDS).nbytes == pickled + 8 * (len(RECORDS) + 1)


def test_pickled_it_is_a_reference_to_the_same_memory() -> None:
    before = _mapped()
    store = RecordStore(RECORDS)
    pickled = pickle.dumps(store)
    again = pickle.loads(pickled)
    assert list(again) == RECORDS
    assert len(_mapped() - before) == 1
    assert len(pickled) < len(pickle.dumps(RECORDS)), "its records do not travel"
    del store, again
    assert _mapped() == before, "the memory goes with the last who holds it"
    with pytest.raises(OSError, match="proc"):
        pickle.loads(pickled)


def test_another_file_under_the_descriptor_is_not_taken_for_the_store(tmp_path: Path) -> None:
    store = RecordStore(RECORDS)
    opener, (process, descriptor, name, length) = store.__reduce__()
    with open(tmp_path / "other", "w+b") as other, pytest.raises(FileNotFoundError):
        opener(process, other.fileno(), name, length)
    assert list(opener(process, descriptor, name, length)) == RECORDS


def test_without_memory_files_a_pickled_store_holds_its_records(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mtl_rcnn.data.record_store._HAS_MEMORY_FILES", False)
    before = _mapped()
    store = RecordStore(RECORDS)
    pickled = pickle.dumps(store)
    assert list(store) == RECORDS
    assert _mapped() == before
    del store
    assert list(pickle.loads(pickled)) == RECORDS


def _told(toy: Toy, folder: Path, *kind: str) -> tuple[list[int], list[str], list[dict[str, Any]]]:
    """Exit status and output of two ranks that read the toy set together, and what they tell."""
    node = {"name": "toy", "images": str(toy.images), "annotations": [str(toy.boxes), str(toy.points)]}
    data = {"train": [node], "aliases": {}, "min_instances": 0, "on_error": "raise"}
    OmegaConf.save({"data": data}, folder / "config.yaml")
    command = [str(ROOT / "tests" / "record_worker.py"), str(folder / "config.yaml"), str(folder), *kind]
    ended = run_ranks(command, 2)
    told = [json.loads(path.read_text()) for path in sorted(folder.glob("[01].json"))]
    return [status for status, _ in ended], [output for _, output in ended], told


def test_ranks_map_one_copy_and_killed_leave_nothing(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setenv("TMPDIR", str(scratch))
    statuses, outputs, told = _told(toy, tmp_path, "dies")
    assert statuses == [-signal.SIGKILL] * 2, outputs
    assert [rank["read"] for rank in told] == [["toy"], []]
    (dataset,), _ = build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {})
    expected = json.loads(json.dumps(list(dataset.records)))
    assert [rank["records"] for rank in told] == [expected] * 2
    (first,), (second,) = (rank["mapped"] for rank in told)
    assert first == second, "one inode of one device"
    assert first[-1] == "(deleted)", "it stands in no folder"
    assert not [*scratch.rglob("*")]
    assert not [name for name in os.listdir("/dev/shm") if "mtl_rcnn" in name]


def test_ranks_that_cannot_share_read_their_own(toy: Toy, tmp_path: Path) -> None:
    statuses, outputs, told = _told(toy, tmp_path, "apart")
    assert statuses == [0, 0], outputs
    assert [rank["read"] for rank in told] == [["toy"], ["toy"]]
    assert told[0]["records"] == told[1]["records"]
    assert told[0]["mapped"] != told[1]["mapped"]
    assert "rank 1 cannot share the data of local rank 0, and reads its own copy" in outputs[1]


def test_a_fault_that_one_rank_reads_ends_all(toy: Toy, tmp_path: Path) -> None:
    toy.boxes.write_text("{")
    statuses, outputs, told = _told(toy, tmp_path)
    assert statuses == [2, 1], outputs
    assert not told
    assert f"error on rank 0 ({socket.gethostname()}): {toy.boxes}" in outputs[0]
