"""Which images make which batch: a pure function of the seed, computed where it is needed and stored nowhere."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mtl_rcnn.errors import ConfigError

Slot = tuple[int, int]
"""(sample index n, record index): n is the position in the run's infinite stream of samples."""

_EPOCH, _BATCHES, _REPLACEMENT = 1, 2, 3
"""Keys that keep the random streams apart."""


class BatchPlanner:
    """Batches of images of similar shape.

    The stream of samples is one permutation of all records after the other. It is cut into windows; within a window
    samples are sorted by aspect ratio (so that little is padded) and cut into batches, which are then put into random
    order. Everything follows from (seed, epoch) and (seed, window): batch i is the same in a resumed run, on any number
    of ranks, with any number of workers.

    Args:
        sizes: (N, 2) height and width of every record.
        batch_size: images per batch over all ranks.
        window: batches to sort together; fewer where N is small, since a window holds at most a quarter of an epoch
            (otherwise the same images would always meet in the same batch).
        seed: of the run.
        shuffle: False keeps the records' order and sorts nothing.

    Raises:
        ConfigError: no records, or a batch size or window below 1.
    """

    def __init__(
        self,
        sizes: Sequence[tuple[int, int]] | np.ndarray,
        batch_size: int,
        window: int,
        seed: int,
        shuffle: bool = True,
    ) -> None:
        if len(sizes) == 0:
            raise ConfigError("there is no image to train on")
        if batch_size < 1 or window < 1:
            raise ConfigError(f"solver.batch_size={batch_size}, data.window={window}: both must be at least 1")
        size = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
        self.aspect = size[:, 1] / size[:, 0]
        self.batch_size = batch_size
        self.window = min(window, max(1, len(size) // (4 * batch_size)))
        self.seed = seed
        self.shuffle = shuffle
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
        if not self.shuffle:
            return np.arange(len(self))
        return _permutation(len(self), self.seed, _EPOCH, epoch)

    def _window_batches(self, window: int) -> np.ndarray:
        """(window, batch_size, 2): sample index and record index."""
        length = self.window * self.batch_size
        stream = np.arange(window * length, (window + 1) * length)
        epochs = stream // len(self)
        orders = [self._epoch(epoch) for epoch in range(epochs[0], epochs[-1] + 1)]
        records = np.concatenate(orders)[stream - epochs[0] * len(self)]
        if self.shuffle and self.window > 1:
            # Epochs are sorted one by one, up and down in turn, lest a batch hold an image twice where two epochs meet.
            direction = np.where(epochs % 2 == 0, 1.0, -1.0)
            order = np.lexsort((stream, direction * self.aspect[records], epochs))
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


def _permutation(length: int, *key: int) -> np.ndarray:
    # Sorting raw bits: NumPy guarantees these between versions, the methods of its Generator it does not.
    return np.argsort(_bits(length, *key), kind="stable")


def _bits(length: int, *key: int) -> np.ndarray:
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(length)
