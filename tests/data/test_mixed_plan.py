"""A mixture's promises: every batch holds its shares, every image comes once per epoch of its own data set, and all of
it is a pure function of the seed."""

from __future__ import annotations

import itertools
import time

import numpy as np
import pytest

from mtl_rcnn.data.mixed_plan import MixedPlanner, _floor_sum, mixing_shares
from mtl_rcnn.errors import ConfigError

NUMBERS = (500, 60, 7, 1)
SHARES = (0.55, 0.3, 0.14, 0.01)


def sizes(numbers: tuple[int, ...] = NUMBERS) -> list[np.ndarray]:
    rng = np.random.default_rng(0)
    return [rng.integers(100, 400, (number, 2)) for number in numbers]


def plan(batch_size: int = 8, window: int = 4, seed: int = 5, shares=SHARES, numbers=NUMBERS, **options):
    return MixedPlanner(sizes(numbers), shares, batch_size, window, seed, **options)


def of_dataset(planner: MixedPlanner, records: list[int]) -> np.ndarray:
    """The data set of each record."""
    return np.searchsorted(planner.first, records, side="right") - 1


def drawn(planner: MixedPlanner, first: int, number: int) -> np.ndarray:
    """(number, batch_size) records of these batches."""
    return np.array([[record for _, record in planner.batch(index)] for index in range(first, first + number)])


def test_shares_follow_their_formulas() -> None:
    samples = {"a": 100, "b": 25, "c": 400}
    settings = [
        ("proportional", {}, [100, 25, 400]),
        ("sqrt", {}, [10, 5, 20]),
        ("temperature", {"temperature": 4}, [100**0.25, 25**0.25, 400**0.25]),
        ("temperature", {"temperature": 1}, [100, 25, 400]),
        ("uniform", {}, [1, 1, 1]),
        ("ratios", {"ratios": {"b": 3, "a": 1, "c": 0}}, [1, 3, 0]),
    ]
    for method, values, weights in settings:
        found = mixing_shares({"method": method, "temperature": None, "ratios": {}, **values}, samples)
        assert list(found) == list(samples)
        np.testing.assert_allclose(list(found.values()), np.array(weights) / np.sum(weights), rtol=1e-12)
    cold = mixing_shares({"method": "temperature", "temperature": 0.01, "ratios": {}}, {"large": 3000, "small": 1})
    assert cold == {"large": 1.0, "small": 0.0}
    assert mixing_shares({"method": "sqrt", "temperature": None, "ratios": {}}, {"alone": 7}) == {"alone": 1.0}


@pytest.mark.parametrize("batch_size", [1, 2, 8, 16])
@pytest.mark.parametrize("shares", [SHARES, (0.25, 0.25, 0.25, 0.25), (0.97, 0.01, 0.01, 0.01), (0.0, 0.5, 0.0, 0.5)])
def test_every_batch_holds_its_shares_to_within_one_image(batch_size: int, shares: tuple[float, ...]) -> None:
    planner = plan(batch_size, shares=shares)
    meant = batch_size * np.array(shares)
    for index in range(60):
        found = np.bincount(of_dataset(planner, drawn(planner, index, 1)[0].tolist()), minlength=4)
        assert found.sum() == batch_size
        assert (np.abs(found - meant) < 1 + 1e-6).all()


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("batch_size", [2, 8])
def test_shares_are_held_over_a_thousand_draws(seed: int, batch_size: int) -> None:
    planner = plan(batch_size, seed=seed)
    for first in (0, 1000, 123_456):
        batches = 1000 // batch_size
        found = np.bincount(of_dataset(planner, drawn(planner, first, batches).ravel().tolist()), minlength=4)
        shares = found / (batches * batch_size)
        assert (np.abs(shares - SHARES) < 0.02).all()
        large = np.array(SHARES) > 0.1
        assert (np.abs(shares / SHARES - 1)[large] < 0.02).all()


def test_counts_so_far_are_known_in_closed_form() -> None:
    planner = plan()
    quotas = planner.quotas(0, 2000)
    for index in (0, 1, 2, 17, 500, 1999):
        assert planner.drawn(index) == quotas[:index].sum(axis=0).tolist()
    far = planner.drawn(10**9)
    np.testing.assert_allclose(np.array(far) / 8e9, SHARES, atol=1e-8)
    assert (np.array(planner.drawn(10**9 + 50)) - far == planner.quotas(10**9, 50).sum(axis=0)).all()


def test_sums_of_floors() -> None:
    rng = np.random.default_rng(0)
    for _ in range(500):
        number, modulus, slope, offset = (int(rng.integers(*span)) for span in ((0, 30), (1, 50), (-99, 99), (-99, 99)))
        expected = sum((slope * i + offset) // modulus for i in range(number))
        assert _floor_sum(number, modulus, slope, offset) == expected


def test_every_image_once_per_epoch_of_its_data_set() -> None:
    planner = plan()
    batches = 250 * planner.window
    counts = np.bincount(drawn(planner, 0, batches).ravel(), minlength=len(planner))
    for dataset, number in enumerate(planner.drawn(batches)):
        own = counts[planner.first[dataset] : planner.first[dataset + 1]]
        assert own.sum() == number
        assert own.min() >= number // len(own) >= 1
        assert own.max() <= -(-number // len(own))


def test_sample_indices_number_all_samples() -> None:
    planner = plan()
    indices = [n for index in range(30) for n, _ in planner.batch(index)]
    assert sorted(indices) == list(range(30 * 8))
    assert [n for n, _ in planner.batch(29)] == list(range(29 * 8, 30 * 8))


def test_random_access_equals_sequence() -> None:
    planner = plan()
    sequence = [planner.batch(index) for index in range(80)]
    for index in (79, 0, 41, 42, 5):
        assert plan().batch(index) == sequence[index]
        assert planner.batch(index) == sequence[index]
    assert [plan(seed=6).batch(index) for index in range(80)] != sequence


@pytest.mark.parametrize("world", [1, 2, 4])
def test_ranks_share_the_same_batches(world: int) -> None:
    for index in range(20):
        parts = [plan().rank_slice(index, rank, world) for rank in range(world)]
        assert list(itertools.chain(*parts)) == plan().batch(index)


def test_every_rank_gets_of_each_large_data_set() -> None:
    planner = plan(shares=(0.5, 0.5, 0.0, 0.0))
    for index in range(20):
        for rank in range(2):
            part = of_dataset(planner, [record for _, record in planner.rank_slice(index, rank, 2)])
            assert sorted(part) == [0, 0, 1, 1]


def test_windows_bring_similar_shapes_together() -> None:
    def spread(window: int) -> float:
        planner = plan(8, window, numbers=(2000, 1500), shares=(0.6, 0.4))
        aspects = planner.aspect[drawn(planner, 0, 192)]
        return float(np.log(aspects.max(axis=1) / aspects.min(axis=1)).mean())

    assert spread(32) < 0.35 * spread(1)


def test_a_batch_rarely_holds_an_image_twice() -> None:
    planner = plan(8, 32, numbers=(400, 40), shares=(0.5, 0.5))
    batches = drawn(planner, 0, 300)
    assert np.mean([len(set(batch)) for batch in batches.tolist()]) > 7.95


def test_company_changes_also_in_a_small_data_set() -> None:
    planner = plan(8, 32, numbers=(400, 8), shares=(0.5, 0.5))
    together = {frozenset(record for record in batch if record >= 400) for batch in drawn(planner, 0, 60).tolist()}
    assert len(together) > 25


def test_repeats_make_images_come_more_often_and_change_no_share() -> None:
    factors = np.array([1.0] * 50 + [3.0] * 10)
    planner = plan(repeats=[None, factors, None, None])
    batches = 150 * planner.window
    counts = np.bincount(drawn(planner, 0, batches).ravel(), minlength=len(planner))
    own = counts[500:560]
    assert own[50:].mean() == pytest.approx(3 * own[:50].mean(), rel=0.02)
    assert own.sum() / counts.sum() == pytest.approx(SHARES[1], abs=0.005)


def test_a_lost_image_is_replaced_by_its_data_set() -> None:
    planner = plan()
    for index in range(12):
        for n, record in planner.batch(index):
            dataset = of_dataset(planner, [record])[0]
            number = planner.first[dataset + 1] - planner.first[dataset]
            draws = [planner.replacement(n, attempt) for attempt in range(1, 20)]
            assert draws == [plan().replacement(n, attempt) for attempt in range(1, 20)]
            assert (of_dataset(planner, draws[:number]) == dataset).all()
            assert (of_dataset(planner, draws[number:]) != dataset).all()
            assert len(set(draws)) == 19


def test_without_shuffle_records_come_in_order() -> None:
    planner = plan(4, shares=(0.5, 0.5), numbers=(3, 5), shuffle=False)
    batches = drawn(planner, 0, 5)
    assert batches[batches < 3].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0]
    assert batches[batches >= 3].tolist() == [3, 4, 5, 6, 7, 3, 4, 5, 6, 7]


@pytest.mark.parametrize("arguments", [{"numbers": (3, 0, 1, 1)}, {"batch_size": 0}, {"window": 0}])
def test_nonsense_is_refused(arguments: dict) -> None:
    with pytest.raises(ConfigError):
        plan(**arguments)


def test_the_plan_is_fixed_across_versions() -> None:
    # A resumed run must go on as planned, also after an update: these numbers never change.
    planner = MixedPlanner([[(10, 10 + i) for i in range(16)], [(10, 30 - i) for i in range(4)]], (0.7, 0.3), 3, 2, 0)
    assert [planner.batch(index) for index in (0, 9, 1000)] == PLANNED


PLANNED = [[(0, 11), (1, 16), (2, 4)], [(27, 1), (28, 3), (29, 16)], [(3000, 7), (3001, 13), (3002, 16)]]


def test_large_data_sets_are_planned_fast() -> None:
    planner = plan(16, 32, numbers=(118_000, 8000, 1449), shares=(0.7, 0.2, 0.1))
    start = time.perf_counter()
    drawn(planner, 1_000_000, 7375)
    assert time.perf_counter() - start < 10
