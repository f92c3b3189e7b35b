"""The endless stream of one set of records: epoch after epoch, each a permutation that its number says."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

_EPOCH, _REPEAT = 1, 4
"""Keys that keep the random streams apart, from each other and from those of the plans."""


class EpochStream:
    """Which record stands at which position: one permutation of all records after the other.

    With `repeats` a record comes more or less often than once: in each epoch r times rounded up or down at random, as
    (seed, epoch, record) says, so that r is met on average and epochs differ a little in length. The copies of a record
    lie evenly in their epoch.

    Args:
        number: N records.
        seed: of the run.
        shuffle: False keeps the records' order.
        repeats: (N,) how often each record comes in an epoch on average; None: once each.
        key: of this stream, where there are several in a run.

    Attributes:
        length: samples of an epoch, on average: an int without repeats.
    """

    def __init__(
        self,
        number: int,
        seed: int,
        shuffle: bool = True,
        repeats: Sequence[float] | np.ndarray | None = None,
        key: tuple[int, ...] = (),
    ) -> None:
        self.number, self.seed, self.shuffle, self.key = number, seed, shuffle, key
        self.repeats = _uneven(repeats)
        self.length = number if self.repeats is None else float(self.repeats.sum())
        self._starts = [0]
        self._cached = lru_cache(maxsize=2)(self.order)

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ascending positions of the stream: the record, and the epoch of each."""
        epochs, starts = self._epochs_of(positions)
        orders = [self._cached(epoch) for epoch in range(epochs[0], epochs[-1] + 1)]
        return np.concatenate(orders)[positions - starts[0]], epochs

    def order(self, epoch: int) -> np.ndarray:
        """The records of an epoch in their order."""
        if self.repeats is not None:
            return self._repeated_order(epoch)
        if not self.shuffle:
            return np.arange(self.number)
        return permutation(self.number, self.seed, _EPOCH, epoch, *self.key)

    def _repeated_order(self, epoch: int) -> np.ndarray:
        counts = self._counts(epoch)
        records = np.repeat(np.arange(self.number), counts)
        if not self.shuffle:
            return records
        copy = np.arange(len(records)) - np.repeat(np.cumsum(counts) - counts, counts)
        # Copy k of c lies at (k + u) / c of the epoch: evenly, and never where its fellows are.
        place = (copy + uniform(self.number, self.seed, _EPOCH, epoch, *self.key)[records]) / counts[records]
        return records[np.argsort(place, kind="stable")]

    def _counts(self, epoch: int) -> np.ndarray:
        """(N,) how often each record comes in an epoch."""
        whole = np.floor(self.repeats)
        up = uniform(self.number, self.seed, _REPEAT, epoch, *self.key) < self.repeats - whole
        return (whole + up).astype(np.int64)

    def _epochs_of(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Of ascending positions: the epoch of each, and the position at which that epoch starts."""
        if self.repeats is None:
            epochs = positions // self.number
            return epochs, epochs * self.number
        while self._starts[-1] <= positions[-1]:
            self._starts.append(self._starts[-1] + int(self._counts(len(self._starts) - 1).sum()))
        starts = np.array(self._starts)
        epochs = np.searchsorted(starts, positions, side="right") - 1
        return epochs, starts[epochs]


def occurrence(records: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """For each of these samples, how many of the same record and group stand before it."""
    order = np.lexsort((np.arange(len(records)), records, groups))
    same = (np.diff(records[order], prepend=-1) == 0) & (np.diff(groups[order], prepend=-1) == 0)
    position = np.arange(len(records))
    first = np.maximum.accumulate(np.where(same, 0, position))
    result = np.empty(len(records), np.int64)
    result[order] = position - first
    return result


def uniform(length: int, *key: int) -> np.ndarray:
    """(length,) float64 in [0, 1), from the raw bits as NumPy's generator makes them."""
    return (bits(length, *key) >> np.uint64(11)) * 2.0**-53


def permutation(length: int, *key: int) -> np.ndarray:
    """(length,) a permutation, a function of the key."""
    # Sorting raw bits: NumPy guarantees these between versions, the methods of its Generator it does not.
    return np.argsort(bits(length, *key), kind="stable")


def bits(length: int, *key: int) -> np.ndarray:
    """(length,) uint64, a function of the key. Keys that differ only in zeros at their end are the same key."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(length)


def _uneven(repeats: Sequence[float] | np.ndarray | None) -> np.ndarray | None:
    """Repeats as float64, None if all are one: then the stream is that without them."""
    values = None if repeats is None else np.asarray(repeats, dtype=np.float64)
    return None if values is None or (values == 1).all() else values
