"""Records of a dataset, pickled once for all processes of a machine (docs/adr/0024-one-copy-of-the-records.md).

Python objects cannot be shared: every rank has its own, and a forked worker copies each page on which it counts a
reference. What is pickled lies in a memory file instead, which any number of processes map.
"""

from __future__ import annotations

import mmap
import os
import pickle
import tempfile
import uuid
import weakref
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mtl_rcnn.data.target import Record

_HAS_MEMORY_FILES = hasattr(os, "memfd_create")
"""Linux: files without a place in any folder, which end with the last process that has them open, however it ends."""


class RecordStore(Sequence[Record]):
    """Records that are unpickled anew at each access: what one changes in a record does not reach the store.

    Pickled, a store is a reference, by which another process of the same machine maps the same memory, as long as this
    process lives; OSError where it cannot (another machine, another process namespace). Without Linux's memory files a
    pickled store holds its records.

    Attributes:
        nbytes: of the pickled records and their index.
    """

    def __init__(self, records: Iterable[Record]) -> None:
        ends = [0]
        descriptor = _new_file()
        with open(descriptor, "wb", closefd=False) as file:
            for record in records:
                ends.append(ends[-1] + file.write(pickle.dumps(record, protocol=pickle.HIGHEST_PROTOCOL)))
            file.write(np.array(ends, dtype=np.int64).tobytes())
        self._map(descriptor, len(ends) - 1)

    def __len__(self) -> int:
        return len(self._ends) - 1

    def __getitem__(self, index: int | slice) -> Any:
        place = range(len(self))[index]
        if isinstance(place, range):
            return [self[each] for each in place]
        start, end = self._ends[place : place + 2].tolist()
        return pickle.loads(self._bytes[start:end])

    def __reduce__(self) -> tuple[Any, ...]:
        if not _HAS_MEMORY_FILES:
            return RecordStore, (self[:],)
        name = os.readlink(f"/proc/self/fd/{self._descriptor}")
        return _open, (os.getpid(), self._descriptor, name, len(self))

    def _map(self, descriptor: int, length: int) -> None:
        self._descriptor = descriptor  # kept open: other processes open it through this one
        weakref.finalize(self, os.close, descriptor)
        self._bytes = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self.nbytes = len(self._bytes)
        self._ends = np.frombuffer(self._bytes, np.int64, offset=self.nbytes - 8 * (length + 1))


def _new_file() -> int:
    if _HAS_MEMORY_FILES:
        return os.memfd_create(f"mtl_rcnn_records_{uuid.uuid4().hex}")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())


def _open(process: int, descriptor: int, name: str, length: int) -> RecordStore:
    """The store of another process: the file that it has open under this descriptor, if it has this name, which no
    other file has."""
    path = f"/proc/{process}/fd/{descriptor}"
    if os.readlink(path) != name:
        raise FileNotFoundError(f"{path} is not {name}")
    store = RecordStore.__new__(RecordStore)
    store._map(os.open(path, os.O_RDONLY), length)
    return store
