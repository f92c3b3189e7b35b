"""Which images make which batch: a pure function of the seed, computed where it is needed and stored nowhere."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import lru_cache

import numpy as np

from mtl_rcnn.data.epochs import EpochStream, occurrence, permutation
from mtl_rcnn.errors import ConfigError

Slot = tuple[int, int]
"""(sample index n, record index): n is the position in the run's infinite stream of samples."""

_BATCHES, _REPLACEMENT = 2, 3
"""Keys that keep the random streams apart."""


class Plan(ABC):
    """Batches of a run without end. Batch i is the same in a resumed run, on any number of ranks, with any number of
    workers.

    Attributes:
        batch_size: images per batch over all ranks.
        epoch_length: samples of an epoch, on average: an int without repeats.
    """

    batch_size: int
    epoch_length: float

    @abstractmethod
    def batch(self, index: int) -> list[Slot]:
        """The samples of global batch `index` >= 0."""

    @abstractmethod
    def replacement(self, sample_index: int, attempt: int) -> int:
        """Record to take for sample n when `attempt` records before it (>= 1) could not be read: no record twice,
        though the lost one may be among them, and is then lost again."""

    def rank_slice(self, index: int, rank: int, world: int) -> list[Slot]:
        """The part of batch `index` that one of `world` ranks computes. All ranks' parts in a row are the batch.

        Raises:
            ConfigError: the batch size cannot be shared out evenly.
        """
        check_world(self.batch_size, world)
        share = self.batch_size // world
        return self.batch(index)[rank * share : (rank + 1) * share]


class BatchPlanner(Plan):
    """Batches of images of similar shape.

    The stream of samples is one permutation of all records after the other. It is cut into windows; within a window
    samples are sorted by aspect ratio (so that little is padded) and cut into batches, which are then put into random
    order. Everything follows from (seed, epoch) and (seed, window).

    With `repeats` a record comes more or less often than once, see `EpochStream`; its copies lie apart from each other
    in a window.

    Args:
        sizes: (N, 2) height and width of every record.
        batch_size: images per batch over all ranks.
        window: batches to sort together; fewer where N is small, since a window holds at most a quarter of an epoch
            (otherwise the same images would always meet in the same batch).
        seed: of the run.
        shuffle: False keeps the records' order and sorts nothing.
        repeats: (N,) how often each record comes in an epoch on average; None: once each.

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
        check_sizes(len(sizes), batch_size, window)
        self.aspect = aspect_ratios(sizes)
        self.batch_size = batch_size
        self.epochs = EpochStream(len(sizes), seed, shuffle, repeats)
        self.epoch_length = self.epochs.length
        if self.epoch_length < 1:
            raise ConfigError(f"an epoch would hold {self.epoch_length:g} images; raise the datasets' repeat")
        self.window = min(window, max(1, int(self.epoch_length) // (4 * batch_size)))
        self.seed = seed
        self.shuffle = shuffle
        self._window = lru_cache(maxsize=2)(self._window_batches)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.aspect)

    def batch(self, index: int) -> list[Slot]:
        """The samples of global batch `index` >= 0."""
        window, position = divmod(index, self.window)
        return [(int(n), int(record)) for n, record in self._window(window)[position]]

    def replacement(self, sample_index: int, attempt: int) -> int:
        """See the base class."""
        return int(permutation(len(self), self.seed, _REPLACEMENT, sample_index)[(attempt - 1) % len(self)])

    def _window_batches(self, window: int) -> np.ndarray:
        """(window, batch_size, 2): sample index and record index."""
        length = self.window * self.batch_size
        stream = np.arange(window * length, (window + 1) * length)
        records, epochs = self.epochs.at(stream)
        if self.shuffle and self.window > 1:
            # Epochs are sorted one by one, up and down in turn, lest a batch hold an image twice where two epochs meet.
            direction = np.where(epochs % 2 == 0, 1.0, -1.0)
            # So are second copies of an image, after all first ones: sorted by shape they would share a batch.
            copies = np.zeros(length, np.int64) if self.epochs.repeats is None else occurrence(records, epochs)
            order = np.lexsort((stream, direction * self.aspect[records], copies, epochs))
            stream, records = stream[order], records[order]
        batches = np.stack([stream, records], axis=1).reshape(self.window, self.batch_size, 2)
        if self.shuffle and self.window > 1:
            batches = batches[permutation(self.window, self.seed, _BATCHES, window)]
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


def check_sizes(records: int, batch_size: int, window: int) -> None:
    """Raises ConfigError where there is nothing to plan, or nothing to plan with."""
    if records == 0:
        raise ConfigError("there is no image to train on")
    if batch_size < 1 or window < 1:
        raise ConfigError(f"solver.batch_size={batch_size}, data.window={window}: both must be at least 1")


def aspect_ratios(sizes: Sequence[tuple[int, int]] | np.ndarray) -> np.ndarray:
    """(N,) width by height of (N, 2) heights and widths."""
    size = np.asarray(sizes, dtype=np.float64).reshape(-1, 2)
    return size[:, 1] / size[:, 0]
