"""Repeat factors equal Detectron2's; how often an image comes follows them, and the plan stays a pure function."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data.samplers import RepeatFactorTrainingSampler

from mtl_rcnn.data.catalog import Dataset
from mtl_rcnn.data.planner import BatchPlanner
from mtl_rcnn.data.records import Report
from mtl_rcnn.data.repeat import repeat_factors, repeat_report
from mtl_rcnn.errors import ConfigError


def records(number: int, classes: int, seed: int = 0) -> list[dict[str, Any]]:
    """Class c is on about one in 2^c images; some images show nothing."""
    rng = np.random.default_rng(seed)
    shown = rng.random((number, classes)) < 0.5 ** np.arange(1, classes + 1)
    return [
        {"annotations": [{"category_id": int(c), "iscrowd": 0} for c in np.flatnonzero(row) for _ in range(c % 2 + 1)]}
        for row in shown
    ]


def dataset(name: str, entries: list[dict[str, Any]], repeat: float = 1.0) -> Dataset:
    return Dataset(name, entries, (), Report(), repeat)


def stream(planner: BatchPlanner, batches: int) -> dict[int, int]:
    """Sample index -> record."""
    return dict(slot for index in range(batches) for slot in planner.batch(index))


def planner(repeats: Any, batch_size: int = 4, window: int = 3, seed: int = 5, **options: Any) -> BatchPlanner:
    sizes = np.random.default_rng(0).integers(100, 400, (len(repeats), 2))
    return BatchPlanner(sizes, batch_size, window, seed, repeats=repeats, **options)


@pytest.mark.parametrize("thresh", [0.001, 0.05, 0.3, 1.0])
def test_factors_equal_detectron2s(thresh: float) -> None:
    parts = records(300, 8), records(111, 6, seed=1)
    expected = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency([*parts[0], *parts[1]], thresh)
    found = repeat_factors([dataset("a", parts[0]), dataset("b", parts[1])], thresh)
    torch.testing.assert_close(torch.tensor(found, dtype=torch.float32), expected, rtol=0, atol=0)
    assert (found.max() > 1) == (thresh > 0.001)


def test_a_datasets_own_repeat_multiplies() -> None:
    one, two = records(10, 3), records(20, 3, seed=1)
    plain = repeat_factors([dataset("a", one), dataset("b", two)], 0.4)
    both = repeat_factors([dataset("a", one, 2), dataset("b", two, 0.5)], 0.4)
    np.testing.assert_array_equal(both, plain * np.repeat([2, 0.5], [10, 20]))
    assert (repeat_factors([dataset("a", one, 3)], None) == 3).all()


def test_images_come_as_often_as_their_factors_say() -> None:
    factors = np.array([0.25, 0.5, 1.0, 1.0, 1.3, 1.75, 2.0, 2.4, 3.9, 7.2] * 3)
    plan = planner(factors, batch_size=5)
    epochs = 2000
    seen = np.zeros(len(factors))
    for epoch in range(epochs):
        counts = np.bincount(plan.epochs.order(epoch), minlength=len(factors))
        assert ((counts == np.floor(factors)) | (counts == np.ceil(factors))).all()
        seen += counts
    fraction = factors - np.floor(factors)
    spread = np.sqrt(epochs * fraction * (1 - fraction))
    assert (np.abs(seen - epochs * factors) <= 4 * spread).all()
    assert plan.epoch_length == pytest.approx(factors.sum())


def test_frequencies_equal_detectron2s_sampler() -> None:
    entries = records(40, 5)
    factors = repeat_factors([dataset("a", entries)], 0.3)
    number = int(800 * factors.sum())
    theirs = itertools.islice(iter(RepeatFactorTrainingSampler(torch.tensor(factors), seed=1)), number)
    expected = np.bincount(list(theirs), minlength=40) / number
    plan = planner(factors)
    found = np.bincount(list(stream(plan, number // plan.batch_size).values()), minlength=40) / number
    np.testing.assert_allclose(found, expected, atol=0.002)
    assert found.max() > 1.5 * found.min()


def test_the_stream_holds_whole_epochs_one_after_the_other() -> None:
    plan = planner([1.5, 0.3, 2.0, 1.0, 4.4] * 5)
    record_of = stream(plan, 40 * plan.window)
    assert sorted(record_of) == list(range(len(record_of)))
    position = 0
    for epoch in range(6):
        order = plan.epochs.order(epoch)
        assert [record_of[position + n] for n in range(len(order))] == order.tolist()
        position += len(order)


def test_random_access_equals_sequence() -> None:
    factors = [1.5, 0.3, 2.0, 1.0] * 8
    sequence = [planner(factors).batch(index) for index in range(60)]
    plan = planner(factors)
    assert [plan.batch(index) for index in range(60)] == sequence
    assert [planner(factors).batch(index) for index in (59, 3, 40)] == [sequence[index] for index in (59, 3, 40)]
    assert [planner(factors, seed=6).batch(index) for index in range(60)] != sequence


def test_ranks_share_the_same_batches() -> None:
    factors = [1.5, 0.3, 2.0, 1.0] * 8
    for index in range(20):
        parts = [planner(factors).rank_slice(index, rank, 2) for rank in range(2)]
        assert [*parts[0], *parts[1]] == planner(factors).batch(index)


def test_copies_keep_apart() -> None:
    plan = planner([4.0] * 4 + [1.0] * 60)
    for epoch in range(20):
        order = plan.epochs.order(epoch)
        for record in range(4):
            assert np.diff(np.flatnonzero(order == record)).min() > 5
    batches = [[record for _, record in planner([3.5] * 12, 4, 32).batch(index)] for index in range(200)]
    assert np.mean([len(set(batch)) for batch in batches]) > 3.9


def test_ones_change_nothing() -> None:
    sizes = np.random.default_rng(0).integers(100, 400, (30, 2))
    plain, ones = (BatchPlanner(sizes, 4, 3, 5, repeats=repeats) for repeats in (None, np.ones(30)))
    assert [plain.batch(index) for index in range(40)] == [ones.batch(index) for index in range(40)]
    assert ones.epoch_length == 30
    assert isinstance(ones.epoch_length, int)


def test_without_shuffle_copies_follow_each_other() -> None:
    plan = planner([2.0, 1.0, 3.0], batch_size=3, shuffle=False)
    assert [record for _, record in plan.batch(0) + plan.batch(1)] == [0, 0, 1, 2, 2, 2]


def test_the_plan_is_fixed_across_versions() -> None:
    # A resumed run must go on as planned, also after an update: these numbers never change.
    sizes = [(10, 10 + i) for i in range(8)]
    plan = BatchPlanner(sizes, 2, 2, seed=0, repeats=[0.5, 1, 1.5, 2, 1, 1, 2.25, 1])
    assert [plan.batch(index) for index in (0, 11)] == PLANNED


PLANNED = [[(0, 3), (1, 6)], [(22, 2), (23, 3)]]


def test_an_epoch_must_hold_something() -> None:
    with pytest.raises(ConfigError, match=r"an epoch would hold 0\.3 images"):
        planner([0.1] * 3)


def test_the_report_names_rare_classes() -> None:
    entries = [{"annotations": [{"category_id": 0}]}] * 99 + [{"annotations": [{"category_id": 1}]}]
    said = repeat_report([dataset("a", entries)], 0.04, ["car", "train"])
    assert said.splitlines() == [
        "a: 100 images, 101.0 samples an epoch on average, each image 1.00 to 2.00 times",
        "1 classes are on less than 0.04 of all images: train 2.00",
    ]
    assert repeat_report([dataset("a", entries)], None, ["car", "train"]) == ""
