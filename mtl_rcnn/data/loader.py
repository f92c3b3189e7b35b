"""Loaders: worker processes run the mapper on what the planner says. They have no random state and share records."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import threading
import traceback
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from torch.utils.data import ConcatDataset, DataLoader, get_worker_info
from torch.utils.data import Dataset as TorchDataset

from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.planner import Plan, Slot, check_world
from mtl_rcnn.data.target import Record, Sample
from mtl_rcnn.errors import DataError, LoaderError, MtlRcnnError, UnreadableImageError

logger = logging.getLogger(__name__)

_MAX_ATTEMPTS = 10
"""Unreadable images in a row for one sample before training gives up: more is no accident."""


_IDLE = -1
_CRASH = "data.workers=0 loads in the main process and shows where it crashes"
_ADVICE = {
    "SIGKILL": "where memory runs out: fewer data.workers, or more memory for the job",
    "SIGBUS": "where shared memory runs out: a larger /dev/shm (docker run --shm-size), or fewer data.workers",
}
"""What mostly is behind the signal that ended a worker."""


@dataclass(frozen=True)
class Exclusion:
    """An image that could not be read, and was left out."""

    dataset: str
    image_id: int | str
    file_name: str
    reason: str


class Loader:
    """Iterates over batches (lists of samples), in order, whatever the number of workers.

    While iterating it raises LoaderError when a batch is waited for and a worker process has ended.

    Attributes:
        excluded: file name -> exclusion, for every image so far that could not be read (`data.on_error=skip`).
    """

    def __init__(self, samples: _Samples, batches: Iterable[list[Slot]], workers: int) -> None:
        self.excluded: dict[str, Exclusion] = {}
        self._samples, self._batches = samples, batches
        samples.loading = multiprocessing.RawArray("q", 2 * workers)
        self._loader = DataLoader(
            samples,
            batch_sampler=batches,
            num_workers=workers,
            collate_fn=list,
            worker_init_fn=_set_up_worker,
            # DataLoader draws a seed for its workers, which nobody uses; not from the global generator, others do.
            generator=torch.Generator(),
        )

    def __len__(self) -> int:
        """Number of batches, for loaders that end."""
        return len(self._batches)

    def __iter__(self) -> Iterator[list[Sample]]:
        for results in self._results():
            samples = [sample for result in results if (sample := self._open(result)) is not None]
            if samples:
                yield samples

    def _results(self) -> Iterator[list[_Result]]:
        others = multiprocessing.active_children()
        with _children_handled_as_before():
            results = iter(self._loader)
        workers = [process for process in multiprocessing.active_children() if process not in others]
        while True:
            try:
                with _workers_watched():
                    batch = next(results, None)
            except RuntimeError as error:
                ended = [worker for worker in workers if worker.exitcode]
                if not ended:
                    raise
                raise LoaderError("; ".join(map(self._last_words, ended))) from error
            if batch is None:
                return
            yield batch

    def _last_words(self, worker: BaseProcess) -> str:
        noted = self._samples.loading
        record = {noted[place]: noted[place + 1] for place in range(0, len(noted), 2)}.get(worker.pid)
        doing = "" if record is None or record == _IDLE else f" while it loaded {_named(self._samples.records[record])}"
        if worker.exitcode > 0:
            return f"data.workers: a worker ended with status {worker.exitcode}{doing}"
        name = signal.Signals(-worker.exitcode).name
        return f"data.workers: a worker was killed by {name}{doing}; {_ADVICE.get(name, _CRASH)}"

    def _open(self, result: _Result) -> Sample | None:
        for exclusion in result.excluded:
            if exclusion.file_name not in self.excluded:
                self.excluded[exclusion.file_name] = exclusion
                logger.warning("left out unreadable image number %d: %s", len(self.excluded), exclusion.reason)
        if result.error is not None:
            raise result.error
        return result.sample


def build_train_loader(
    records: Sequence[Record] | ConcatDataset,
    mapper: Mapper,
    planner: Plan,
    start_iteration: int = 0,
    rank: int = 0,
    world: int = 1,
    workers: int = 0,
) -> Loader:
    """Endless batches of this rank from `start_iteration` on. Samples depend neither on `workers` nor on the start.

    With `data.on_error=skip` an unreadable image is replaced by another, a function of (seed, n, attempt), and named
    in `Loader.excluded`.

    Args:
        records: by their number in the plan; those of `RecordStore`s are not copied by workers.

    Raises:
        ConfigError: the batch size cannot be shared out evenly among the ranks.
        DataError: while iterating, on a faulty record.
    """
    check_world(planner.batch_size, world)
    return Loader(_Samples(records, mapper, planner), _PlannedBatches(planner, start_iteration, rank, world), workers)


def build_eval_loader(
    records: Sequence[Record], mapper: Mapper, rank: int = 0, world: int = 1, workers: int = 0, batch_size: int = 1
) -> Loader:
    """Every record once over all ranks, in order, each rank a part in a row; `sample_index` is the record's index.

    With `data.on_error=skip` unreadable images are left out, and named in `Loader.excluded`.
    """
    start, end = (len(records) * part // world for part in (rank, rank + 1))
    slots = [(index, index) for index in range(start, end)]
    batches = [slots[first : first + batch_size] for first in range(0, len(slots), batch_size)]
    return Loader(_Samples(records, mapper, None), batches, workers)


@dataclass
class _Result:
    """What a worker hands over.

    Errors travel as values. Raised in a worker, torch would wrap their text in a traceback, and hold the workers in a
    reference cycle that takes ten seconds to end.
    """

    sample: Sample | None
    excluded: tuple[Exclusion, ...] = ()
    error: Exception | None = None


class _Samples(TorchDataset):
    """(sample index, record index) -> result. Without a planner an unreadable image is left out, not replaced."""

    def __init__(self, records: Sequence[Record] | ConcatDataset, mapper: Mapper, planner: Plan | None) -> None:
        self.records = records
        self.mapper = mapper
        self.planner = planner
        self.loading: Sequence[int] = ()
        """Of each worker its process and the record it is at, in memory that it shares with the main process."""

    def __getitem__(self, slot: Slot) -> _Result:
        sample_index, record_index = slot
        excluded: list[Exclusion] = []
        for attempt in range(_MAX_ATTEMPTS):
            record = self.records[record_index]
            try:
                with self._noted(record_index):
                    return _Result(self.mapper(record, sample_index, attempt), tuple(excluded))
            except UnreadableImageError as error:
                if self.mapper.on_error != "skip":
                    return _Result(None, error=error)
                excluded.append(Exclusion(record["dataset"], record["image_id"], record["file_name"], str(error)))
            except MtlRcnnError as error:
                return _Result(None, tuple(excluded), error)
            except Exception as error:
                return _Result(None, tuple(excluded), _bug(record, error))
            if self.planner is None:
                return _Result(None, tuple(excluded))
            record_index = self.planner.replacement(sample_index, attempt + 1)
        text = f"sample {sample_index}: {_MAX_ATTEMPTS} images in a row cannot be read, the last: {excluded[-1].reason}"
        return _Result(None, tuple(excluded), DataError(text))

    @contextmanager
    def _noted(self, record_index: int) -> Iterator[None]:
        worker = get_worker_info()
        if worker is None:
            yield
            return
        place = 2 * worker.id
        self.loading[place : place + 2] = [os.getpid(), record_index]
        try:
            yield
        finally:
            self.loading[place + 1] = _IDLE


def _bug(record: Record, error: Exception) -> RuntimeError:
    """An error that is not the user's: with its traceback, which would not survive the way out of the worker."""
    return RuntimeError(
        f"while loading {_named(record)}: "
        f"{type(error).__name__}: {error}\n\n{''.join(traceback.format_exception(error))}"
    )


def _named(record: Record) -> str:
    return f"{record['file_name']} (dataset {record['dataset']!r}, image id {record['image_id']})"


class _PlannedBatches:
    """This rank's part of batch after batch."""

    def __init__(self, planner: Plan, start: int, rank: int, world: int) -> None:
        self.planner = planner
        self.start = start
        self.rank = rank
        self.world = world

    def __iter__(self) -> Iterator[list[Slot]]:
        index = self.start
        while True:
            yield self.planner.rank_slice(index, self.rank, self.world)
            index += 1


_of_torch: list[Any] = []
"""Torch's handler of SIGCHLD, which it installs with its first workers and never again."""


@contextmanager
def _children_handled_as_before() -> Iterator[None]:
    """Torch's handler raises a worker's end wherever the main thread is: in an update of the weights, in writing a
    file. It is taken out, and active only while a batch is waited for (`_workers_watched`)."""
    before = signal.getsignal(signal.SIGCHLD)
    try:
        yield
    finally:
        installed = signal.getsignal(signal.SIGCHLD)
        if installed is not before:
            _of_torch[:] = [installed]
            signal.signal(signal.SIGCHLD, signal.SIG_DFL if before is None else before)


@contextmanager
def _workers_watched() -> Iterator[None]:
    """Without it a worker that died in the middle of handing over a batch would be waited for for ever."""
    if not _of_torch or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGCHLD, _of_torch[0])
    try:
        _of_torch[0](signal.SIGCHLD, None)  # raises if a worker has ended since the last batch
        yield
    finally:
        signal.signal(signal.SIGCHLD, before)


def _set_up_worker(worker: int) -> None:
    """OpenCV's own threads would fight with those of the other workers (torch already keeps to one). SIGTERM is obeyed
    from the main process alone: SLURM and torchrun send it to all processes of a run, which has batches to finish."""
    import cv2

    cv2.setNumThreads(0)
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        threading.Thread(target=_obey, args=(os.getppid(),), daemon=True).start()


def _obey(main_process: int) -> None:
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid not in (main_process, os.getpid()):
        continue
    os._exit(0)
