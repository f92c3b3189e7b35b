"""Which images make which batch: a pure function of the seed, computed where it is needed and stored nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mtl_rcnn.errors import ConfigError

Slot = tuple[int, int]
"""(sample index n, record index): n is the position in the run's infinite stream of samples."""

_EPOCH, _BATCHES, _REPLACEMENT, _REPEAT = 1, 2, 3, 4
"""Keys that keep the random streams apart."""


class BatchPlanner:
    """Batches of images of similar shape.

    The stream of samples is one permutation of all records after the other. It is cut into windows; within a window
    samples are sorted by aspect ratio (so that little is padded) and cut into batches, which are then put into random
    order. Everything follows from (seed, epoch) and (seed, window): batch i is the same in a resumed run, on any number
    of ranks, with any number of workers.

    With `repeats` a record comes more or less often than once: in each epoch r times rounded up or down at random, as
    (seed, epoch, record) says, so that r is met on average and epochs differ a little in length. The copies of a record
    lie evenly in their epoch, and apart from each other in a window.

    Args:
        sizes: (N, 2) height and width of every record.
        batch_size: images per batch over all ranks.
        window: batches to sort together; fewer where N is small, since a window holds at most a quarter of an epoch
            (otherwise the same images would always meet in the same batch).
        seed: of the run.
        shuffle: False keeps the records' order and sorts nothing.
        repeats: (N,) how often each record comes in an epoch on average; None: once each.

    Attributes:
        epoch_length: samples of an epoch, on average: an int without repeats.

    Raises:
        ConfigError: no records, a batch size or window below 1, or repeats by which an epoch holds less than one image.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]] | np.ndarray,
        batch_size: int,
        window: int,
        seed: int,
        shuffle: bool = True,
        repeats: Sequence[float] | np.ndarray | None = None,
    ) -> None:
        if len(sizes) == 0:
            raise ConfigError("there is no image to train on")
        if batch_size < 1 or window < 1:
            raise ConfigError(f"solver.batch_size={batch_size}, data.window={window}: both must be at least 1")
        size = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
        self.aspect = size[:, 1] / size[:, 0]
        self.batch_size = batch_size
        self.repeats = _uneven(repeats)
        self.epoch_length = len(size) if self.repeats is None else float(self.repeats.sum())
        if self.epoch_length < 1:
            raise ConfigError(f"an epoch would hold {self.epoch_length:g} images; raise the datasets' repeat")
        self.window = min(window, max(1, int(self.epoch_length) // (4 * batch_size)))
        self.seed = seed
        self.shuffle = shuffle
        self._starts = [0]
        self._epoch = lru_cache(maxsize=2)(self._epoch_order)
        self._window = lru_cache(maxsize=2)(self._window_batches)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.aspect)

    def batch(self, index: int) -> list[Slot]:
        """The samples of global batch `index` >= 0."""
        window, position = divmod(index, self.window)
        return [(int(n), int(record)) for n, record in self._window(window)[position]]

    def rank_slice(self, index: int, rank: int, world: int) -> list[Slot]:
        """The part of batch `index` that one of `world` ranks computes. All ranks' parts in a row are the batch.

        Raises:
            ConfigError: the batch size cannot be shared out evenly.
        """
        check_world(self.batch_size, world)
        share = self.batch_size // world
        return self.batch(index)[rank * share : (rank + 1) * share]

    def replacement(self, sample_index: int, attempt: int) -> int:
        """Record to take for sample n when `attempt` records before it (>= 1) could not be read: no record twice."""
        return int(_permutation(len(self), self.seed, _REPLACEMENT, sample_index)[(attempt - 1) % len(self)])

    def _epoch_order(self, epoch: int) -> np.ndarray:
        if self.repeats is not None:
            return self._repeated_order(epoch)
        if not self.shuffle:
            return np.arange(len(self))
        return _permutation(len(self), self.seed, _EPOCH, epoch)

    def _repeated_order(self, epoch: int) -> np.ndarray:
        counts = self._counts(epoch)
        records = np.repeat(np.arange(len(self)), counts)
        if not self.shuffle:
            return records
        copy = np.arange(len(records)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Copy k of c lies at (k + u) / c of the epoch: evenly, and never where its fellows are.
        place = (copy + _uniform(len(self), self.seed, _EPOCH, epoch)[records]) / counts[records]
        return records[np.argsort(place, kind="stable")]

    def _counts(self, epoch: int) -> np.ndarray:
        """(N,) how often each record comes in an epoch."""
        whole = np.floor(self.repeats)
        up = _uniform(len(self), self.seed, _REPEAT, epoch) < self.repeats - whole
        return (whole + up).astype(np.int64)

    def _epochs_of(self, stream: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ascending sample indices: the epoch of each, and the index at which that epoch starts."""
        if self.repeats is None:
            epochs = stream // len(self)
            return epochs, epochs * len(self)
        while self._starts[-1] <= stream[-1]:
            self._starts.append(self._starts[-1] + int(self._counts(len(self._starts) - 1).sum()))
        starts = np.array(self._starts)
        epochs = np.searchsorted(starts, stream, side="right") - 1
        return epochs, starts[epochs]

    def _window_batches(self, window: int) -> np.ndarray:
        """(window, batch_size, 2): sample index and record index."""
        length = self.window * self.batch_size
        stream = np.arange(window * length, (window + 1) * length)
        epochs, starts = self._epochs_of(stream)
        orders = [self._epoch(epoch) for epoch in range(epochs[0], epochs[-1] + 1)]
        records = np.concatenate(orders)[stream - starts[0]]
        if self.shuffle and self.window > 1:
            # Epochs are sorted one by one, up and down in turn, lest a batch hold an image twice where two epochs meet.
            direction = np.where(epochs % 2 == 0, 1.0, -1.0)
            # So are second copies of an image, after all first ones: sorted by shape they would share a batch.
            copies = np.zeros(length, np.int64) if self.repeats is None else _occurrence(records, epochs)
            order = np.lexsort((stream, direction * self.aspect[records], copies, epochs))
            stream, records = stream[order], records[order]
        batches = np.stack([stream, records], axis=1).reshape(self.window, self.batch_size, 2)
        if self.shuffle and self.window > 1:
            batches = batches[_permutation(self.window, self.seed, _BATCHES, window)]
        return batches


def check_world(batch_size: int, world: int, accumulate: int = 1) -> None:
    """Raises ConfigError if `batch_size` images cannot be shared evenly among `world` ranks with `accumulate`
    micro-batches each."""
    shares = world * accumulate
    if batch_size % shares:
        parts = f" with solver.accumulate={accumulate} micro-batches each" if accumulate > 1 else ""
        raise ConfigError(
            f"solver.batch_size={batch_size} cannot be shared by {world} ranks{parts}; choose a multiple of {shares}, "
            f"such as {max(1, batch_size // shares) * shares}"
        )


def _uneven(repeats: Sequence[float] | np.ndarray | None) -> np.ndarray | None:
    """Repeats as float64, None if all are one: then the plan is that of a planner without them."""
    values = None if repeats is None else np.asarray(repeats, dtype=np.float64)
    return None if values is None or (values == 1).all() else values


def _occurrence(records: np.ndarray, epochs: np.ndarray) -> np.ndarray:
    """For each of these samples, how many of the same record and epoch stand before it."""
    order = np.lexsort((np.arange(len(records)), records, epochs))
    same = (np.diff(records[order], prepend=-1) == 0) & (np.diff(epochs[order], prepend=-1) == 0)
    position = np.arange(len(records))
    first = np.maximum.accumulate(np.where(same, 0, position))
    result = np.empty(len(records), np.int64)
    result[order] = position - first
    return result


def _uniform(length: int, *key: int) -> np.ndarray:
    """(length,) float64 in [0, 1), from the raw bits as NumPy's generator makes them."""
    return (_bits(length, *key) >> np.uint64(11)) * 2.0**-53


def _permutation(length: int, *key: int) -> np.ndarray:
    # Sorting raw bits: NumPy guarantees these between versions, the methods of its Generator it does not.
    return np.argsort(_bits(length, *key), kind="stable")


def _bits(length: int, *key: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
