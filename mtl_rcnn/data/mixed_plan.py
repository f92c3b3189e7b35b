"""Several data sets in every batch, each with its share: a pure function of the seed, as the plain plan is.

Shares of data sets with n_d samples an epoch, as they are used for multilingual and multi-task mixtures
(T5, arXiv 1910.10683, section 3.5.2; the temperature is theirs, without their artificial limit on n_d):
    proportional  n_d               sqrt     sqrt(n_d)
    temperature   n_d^(1/T)         uniform  1             ratios  as given
each divided by the sum over the data sets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any

import numpy as np

from mtl_rcnn.data.epochs import EpochStream, bits, occurrence, permutation, uniform
from mtl_rcnn.data.planner import Plan, Slot, aspect_ratios, check_sizes

_BATCHES, _EPOCHS, _START, _PLACES, _OWN, _OTHER = 11, 12, 13, 14, 15, 16
"""Keys that keep the random streams apart."""
_ONE = 1 << 32
"""Places on the line of quotas per image."""
_STEP = 0x9E3779B9
"""The golden ratio's share of `_ONE`, odd: of all steps it leaves the smallest gaps, however many batches there are."""


def mixing_shares(mixing: Mapping[str, Any], samples: Mapping[str, float]) -> dict[str, float]:
    """The share of each data set in every batch; they add up to 1.

    Args:
        mixing: the node `data.mixing`, checked (`config.mixing_checks`), whose method is not null.
        samples: data set -> n_d, its samples of an epoch.
    """
    method = mixing["method"]
    if method == "ratios":
        weights = {name: float(mixing["ratios"][name]) for name in samples}
    else:
        temperature = {"proportional": 1.0, "sqrt": 2.0, "uniform": np.inf}.get(method, mixing["temperature"])
        most = max(samples.values())  # of the largest the weight is 1: no power of any temperature overflows
        weights = {name: float(number / most) ** (1.0 / temperature) for name, number in samples.items()}
    return {name: weight / sum(weights.values()) for name, weight in weights.items()}


class MixedPlanner(Plan):
    """Batches that hold each data set's share to within one image, of images of similar shape.

    Quotas: the data sets lie side by side on a line of length B, each as long as its share of B images; batch b takes
    the data sets in which the points u_b, u_b + 1, ..., u_b + B - 1 lie (systematic sampling). So a data set has B p_d
    images in a batch, rounded up or down; and since u_b steps through [0, 1) by the golden ratio, all batches so far
    hold B p_d on average, but for a few images. How many a data set has had before batch b is a sum of floors of a
    linear function, which is computed in closed form: any batch can be asked for first.

    Samples: every data set goes through its own epochs (`EpochStream`), in its own random order. Within a window each
    one's samples are sorted by aspect ratio and dealt to the batches in the same order, which are then shuffled; a data
    set of few images is sorted in shorter stretches, lest the same images always meet. Within a batch the data sets
    alternate, so that every rank's part holds of each.

    Args:
        sizes: per data set (N_d, 2) height and width of its records; records are numbered through all of them.
        shares: of each data set, at least 0, adding up to 1.
        batch_size: B images per batch over all ranks.
        window: batches to sort together; at most a quarter of an epoch.
        seed: of the run.
        epoch_length: samples of an epoch, for durations in epochs; None: the number of images.
        repeats: per data set (N_d,) how often each record comes in the data set's epoch on average; None: once each.
        shuffle: False keeps the records' order in each data set and sorts nothing.

    Raises:
        ConfigError: a data set without records, or a batch size or window below 1.
    """

    def __init__(
        self,
        sizes: Sequence[Sequence[tuple[int, int]] | np.ndarray],
        shares: Sequence[float],
        batch_size: int,
        window: int,
        seed: int,
        epoch_length: float | None = None,
        repeats: Sequence[np.ndarray | None] | None = None,
        shuffle: bool = True,
    ) -> None:
        numbers = [len(size) for size in sizes]
        check_sizes(min(numbers, default=0), batch_size, window)
        self.aspect = np.concatenate([aspect_ratios(size) for size in sizes])
        self.first = np.cumsum([0, *numbers])
        self.shares = np.asarray(shares, dtype=np.float64)
        self.batch_size, self.seed, self.shuffle = batch_size, seed, shuffle
        each = [None] * len(numbers) if repeats is None else repeats
        self.epochs = [
            EpochStream(number, seed, shuffle, own, key=(_EPOCHS, index))
            for index, (number, own) in enumerate(zip(numbers, each))
        ]
        self.epoch_length = sum(numbers) if epoch_length is None else epoch_length
        self.window = min(window, max(1, int(self.epoch_length) // (4 * batch_size))) if shuffle else 1
        self._bounds = np.rint(np.cumsum([0.0, *self.shares]) * batch_size * _ONE).astype(np.int64)
        self._bounds[-1] = batch_size * _ONE
        self._start = int(bits(1, seed, _START)[0]) % _ONE if shuffle else 0
        self._window = lru_cache(maxsize=2)(self._window_batches)

    def __len__(self) -> int:
        """Number of records."""
        return len(self.aspect)

    def batch(self, index: int) -> list[Slot]:
        """The samples of global batch `index` >= 0."""
        window, position = divmod(index, self.window)
        records = self._window(window)[position]
        return [(index * self.batch_size + place, int(record)) for place, record in enumerate(records)]

    def quotas(self, first: int, number: int) -> np.ndarray:
        """(number, D) int64: images of each data set in the batches from `first` on."""
        steps = ((self._start + _STEP * first) % _ONE + _STEP * np.arange(number, dtype=np.int64)) % _ONE
        return np.diff(-((steps[:, None] - self._bounds) // _ONE), axis=1)

    def drawn(self, index: int) -> list[int]:
        """How many images of each data set the batches before `index` hold, in closed form."""
        # ceil((c - u) / M) with u = (s + g b) mod M is floor((c + M - 1 - s - g b) / M) + floor((s + g b) / M).
        passed = _floor_sum(index, _ONE, _STEP, self._start)
        upto = [_floor_sum(index, _ONE, -_STEP, int(bound) + _ONE - 1 - self._start) + passed for bound in self._bounds]
        return np.diff(upto).tolist()

    def replacement(self, sample_index: int, attempt: int) -> int:
        """See the base class. Of the same data set, so that its share stays; of the others when it has none left."""
        lost = self.batch(sample_index // self.batch_size)[sample_index % self.batch_size][1]
        dataset = int(np.searchsorted(self.first, lost, side="right")) - 1
        start, end = self.first[dataset], self.first[dataset + 1]
        own = start + permutation(end - start, self.seed, _OWN, sample_index)
        others = permutation(len(self), self.seed, _OTHER, sample_index)
        order = np.concatenate([own, others[(others < start) | (others >= end)]])
        return int(order[(attempt - 1) % len(order)])

    def _window_batches(self, window: int) -> np.ndarray:
        """(window, batch_size) record indices."""
        first = window * self.window
        quotas, before = self.quotas(first, self.window), self.drawn(first)
        # Rank r of a batch: it gets the r-th narrowest images of every data set.
        ranks = permutation(self.window, self.seed, _BATCHES, window) if self.shuffle else np.arange(self.window)
        shifts = np.full(quotas.shape, 0.5)
        if self.shuffle:
            shifts = uniform(quotas.size, self.seed, _PLACES, window).reshape(quotas.shape)
        by_rank = np.argsort(ranks)
        parts = []
        for dataset in range(quotas.shape[1]):
            counts = quotas[by_rank, dataset]
            batch = np.repeat(by_rank, counts)
            within = np.arange(len(batch)) - np.repeat(np.cumsum(counts) - counts, counts)
            place = (within + shifts[batch, dataset]) / quotas[batch, dataset]
            parts.append((batch, place, self._sorted_part(dataset, before[dataset], np.repeat(ranks[by_rank], counts))))
        batch, place, records = (np.concatenate(values) for values in zip(*parts))
        return records[np.lexsort((place, batch))].reshape(self.window, self.batch_size)

    def _sorted_part(self, dataset: int, start: int, ranks: np.ndarray) -> np.ndarray:
        """A data set's next samples, one for each of these (ascending) ranks of the window, narrow images first."""
        if len(ranks) == 0:
            return np.empty(0, np.int64)
        stream, number = self.epochs[dataset], len(ranks)
        positions = np.arange(start, start + number)
        records = stream.at(positions)[0] + self.first[dataset]
        if self.shuffle and self.window > 1:
            stretch = max(1, int(stream.length * self.window / (4 * number)))
            stretches = ranks // stretch
            copies = occurrence(records, stretches)  # a second copy of an image shares no batch with the first
            records = records[np.lexsort((positions, self.aspect[records], copies, stretches))]
        return records


def _floor_sum(number: int, modulus: int, slope: int, offset: int) -> int:
    """The sum over 0 <= i < number of floor((slope i + offset) / modulus), exactly, in logarithmic time: whole parts
    are summed at once, what is left is counted along the other axis, as in Euclid's algorithm."""
    total = 0
    while number > 0:
        whole, slope = divmod(slope, modulus)
        total += whole * number * (number - 1) // 2
        whole, offset = divmod(offset, modulus)
        total += whole * number
        top = slope * number + offset
        number, offset = divmod(top, modulus)
        modulus, slope = slope, modulus
        if modulus == 0:
            break
    return total
