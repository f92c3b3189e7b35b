"""Whether two runs left the same, and a disk that takes no more."""

from __future__ import annotations

import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from mtl_rcnn.engine.checkpoint import Checkpointer, load
from mtl_rcnn.engine.progress import read_metrics


def assert_equal_runs(first: Path, second: Path) -> None:
    """The newest checkpoints, `metrics.jsonl` and `metrics.json` of two runs are the same, bit for bit."""
    states = [load(Checkpointer(folder, keep=1).latest()) for folder in (first, second)]
    for part in states[0]:
        if part != "config":  # it names the directory
            assert equal(*(state[part] for state in states)), part
    assert read_metrics(first / "metrics.jsonl") == read_metrics(second / "metrics.jsonl")
    texts = [path.read_text() for path in (first / "metrics.json", second / "metrics.json") if path.exists()]
    assert len(texts) != 1
    assert texts[:1] == texts[1:]


def equal(a: object, b: object) -> bool:
    """Whether two nested values with tensors are the same, bit for bit."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(equal(*pair) for pair in zip(a, b))
    return a == b


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """Files cannot grow beyond so many bytes: an error of the system, as of a full disk, that needs no disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
