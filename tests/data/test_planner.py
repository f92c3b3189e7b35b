"""The batch planner's promises: every image once per epoch, a pure function of the seed, alike on all ranks."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mtl_rcnn.data.planner import BatchPlanner
from mtl_rcnn.errors import ConfigError


def _sizes(number: int) -> np.ndarray:
    return np.random.default_rng(0).integers(100, 400, (number, 2))


def _planner(number: int = 60, batch_size: int = 4, window: int = 3, seed: int = 5, **options) -> BatchPlanner:
    return BatchPlanner(_sizes(number), batch_size, window, seed, **options)


def _samples(planner: BatchPlanner, batches: int) -> list[tuple[int, int]]:
    return [slot for index in range(batches) for slot in planner.batch(index)]


@pytest.mark.parametrize(
    ("number", "batch_size", "window"), [(60, 4, 3), (61, 4, 3), (7, 4, 32), (3, 8, 2), (1, 1, 1), (97, 6, 5)]
)
def test_every_record_once_per_epoch(number: int, batch_size: int, window: int):
    planner = _planner(number, batch_size, window)
    whole_windows = planner.window * -(-3 * number // (planner.window * batch_size))
    record_of = dict(_samples(planner, whole_windows))
    assert sorted(record_of) == list(range(whole_windows * batch_size))
    for epoch in range(3):
        records = [record_of[n] for n in range(epoch * number, (epoch + 1) * number)]
        assert sorted(records) == list(range(number))


def test_epochs_seeds_and_batches_differ():
    planner = _planner()
    record_of = dict(_samples(planner, 30))
    first, second = ([record_of[n] for n in range(start, start + 60)] for start in (0, 60))
    assert first != second
    assert first != list(range(60))
    assert _samples(planner, 15) != _samples(_planner(seed=6), 15)


def test_random_access_equals_sequence():
    sequence = [_planner().batch(0)] + [None] * 39
    planner = _planner()
    for index in range(40):
        sequence[index] = planner.batch(index)
    for index in [39, 0, 17, 38, 3, 17]:
        assert _planner().batch(index) == sequence[index]
        assert planner.batch(index) == sequence[index]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_batches(world: int):
    planner = _planner(batch_size=8)
    for index in range(20):
        parts = [_planner(batch_size=8).rank_slice(index, rank, world) for rank in range(world)]
        assert {len(part) for part in parts} == {8 // world}
        assert list(itertools.chain(*parts)) == planner.batch(index)


def test_batch_that_cannot_be_shared_is_refused():
    with pytest.raises(
        ConfigError, match=r"solver\.batch_size=4 cannot be shared by 3 ranks; choose a multiple of 3, such as 3"
    ):
        _planner().rank_slice(0, 0, 3)


@pytest.mark.parametrize("arguments", [{"number": 0}, {"batch_size": 0}, {"window": 0}])
def test_nonsense_is_refused(arguments: dict):
    with pytest.raises(ConfigError):
        _planner(**arguments)


def test_windows_bring_similar_shapes_together():
    def spread(window: int) -> float:
        planner = _planner(2000, 8, window)
        aspects = [[planner.aspect[record] for _, record in planner.batch(i)] for i in range(192)]
        return float(np.mean([np.log(max(batch) / min(batch)) for batch in aspects]))

    assert spread(32) < 0.2 * spread(1)


def test_company_changes_from_epoch_to_epoch():
    # With 16 images and a large window, a plain sort would put the same 4 together for ever.
    planner = _planner(16, 4, 32)
    together = {frozenset(record for _, record in planner.batch(index)) for index in range(40)}
    assert len(together) > 30


def test_batch_within_an_epoch_holds_no_image_twice():
    planner = _planner(16, 4, 32)
    for index in range(100):
        assert len({record for _, record in planner.batch(index)}) == 4


def test_without_shuffle_records_come_in_order():
    planner = _planner(10, 4, 2, shuffle=False)
    assert [record for _, record in _samples(planner, 5)] == [*range(10), *range(10)]
    assert [n for n, _ in _samples(planner, 5)] == list(range(20))


def test_replacement_is_a_function_of_sample_and_attempt():
    draws = [[_planner().replacement(n, attempt) for attempt in (1, 2, 3)] for n in range(50)]
    assert draws == [[_planner().replacement(n, attempt) for attempt in (1, 2, 3)] for n in range(50)]
    assert len({record for row in draws for record in row}) > 40
    assert {_planner().replacement(0, attempt) for attempt in range(1, 61)} == set(range(60))
    assert all(0 <= record < 60 for row in draws for record in row)


def test_the_plan_is_fixed_across_versions():
    # A resumed run must go on as planned, also after an update: these numbers never change.
    planner = BatchPlanner([(10, 10 + i) for i in range(16)], 2, 2, seed=0)
    assert [planner.batch(i) for i in (0, 9)] == PLANNED


PLANNED = [[(2, 3), (3, 7)], [(16, 9), (19, 8)]]


def test_large_datasets_are_planned_fast():
    planner = BatchPlanner(_sizes(118_000), 16, 32, seed=1)
    start = time.perf_counter()
    _samples(planner, 7375)
    assert time.perf_counter() - start < 10
