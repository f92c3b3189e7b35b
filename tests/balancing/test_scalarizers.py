"""Balancing of losses: each method against its formula in NumPy, and what must hold of all of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import pytest
import torch

from mtl_rcnn.balancing import (
    FAMO,
    IMTLL,
    DynamicWeightAverage,
    GeometricMean,
    RandomLossWeighting,
    Scalarizer,
    UncertaintyWeighting,
    WeightedSum,
)
from mtl_rcnn.errors import ConfigError

PARTS = ("detection/cls", "detection/loc", "mask/bce", "depth/regression")
TASKS = ("detection", "mask", "depth")
METHODS: dict[str, Callable[..., Scalarizer]] = {
    "sum": WeightedSum,
    "uncertainty": lambda parts, weights=None: UncertaintyWeighting(
        parts, weights, regression=["depth"] if "depth/regression" in parts else []
    ),
    "dwa": lambda parts, weights=None: DynamicWeightAverage(parts, weights, period=2),
    "rlw": lambda parts, weights=None: RandomLossWeighting(parts, weights, seed=5),
    "imtl_l": IMTLL,
    "geometric_mean": GeometricMean,
    "famo": lambda parts, weights=None: FAMO(parts, weights, every=2),
}
NOT_SYMMETRIC = ("rlw",)
"""Draws belong to places: the same values in another order meet other draws."""


def drawn(step: int, parts: Sequence[str] = PARTS) -> dict[str, float]:
    """Losses of a step, between 0.2 and 2, by name alone."""
    return {part: float(np.random.default_rng([step, *part.encode()]).uniform(0.2, 2)) for part in parts}


def valid(*absent: str) -> dict[str, bool]:
    return {task: task not in absent for task in TASKS}


def run(balancer: Scalarizer, steps: Sequence[int], values: Callable[[int], Mapping[str, float]] = drawn, *absent: str):
    """Factors of the parts in each step."""
    found = []
    for step in steps:
        given = values(step)
        present = {task: task not in absent for task in balancer.tasks}
        given = {part: value * present[part.split("/")[0]] for part, value in given.items()}
        balancer({part: torch.tensor(value) for part, value in given.items()}, given, present)
        found.append(balancer.weights())
        balancer.step()
        if balancer.looks_again:
            balancer.seen_again({part: 0.9 * value - 0.01 * step for part, value in given.items()})
    return found


def softmax(values: Any) -> np.ndarray:
    exp = np.exp(np.asarray(values) - np.max(values))
    return exp / exp.sum()


def totals(step: int) -> np.ndarray:
    values = drawn(step)
    return np.array([values["detection/cls"] + values["detection/loc"], values["mask/bce"], values["depth/regression"]])


class Adam:
    """As in its paper (arXiv 1412.6980, algorithm 1), with L2 decay added to the gradient."""

    def __init__(self, size: int, lr: float, decay: float = 0.0) -> None:
        self.x, self.m, self.v, self.t, self.lr, self.decay = (
            np.zeros(size),
            np.zeros(size),
            np.zeros(size),
            0,
            lr,
            decay,
        )

    def step(self, gradient: np.ndarray) -> None:
        gradient = gradient + self.decay * self.x
        self.t += 1
        self.m = 0.9 * self.m + 0.1 * gradient
        self.v = 0.999 * self.v + 0.001 * gradient**2
        m, v = self.m / (1 - 0.9**self.t), self.v / (1 - 0.999**self.t)
        self.x = self.x - self.lr * m / (np.sqrt(v) + 1e-8)


def by_task(found: Mapping[str, float]) -> np.ndarray:
    assert found["detection/cls"] == found["detection/loc"]
    return np.array([found["detection/cls"], found["mask/bce"], found["depth/regression"]])


def test_uncertainty_follows_the_paper() -> None:
    adam, share = Adam(3, 0.025), np.array([1, 1, 0.5])
    for step, found in enumerate(run(METHODS["uncertainty"](PARTS), range(20))):
        np.testing.assert_allclose(by_task(found), share * np.exp(-adam.x), rtol=1e-9)
        adam.step(-share * np.exp(-adam.x) * totals(step) + 0.5)


def test_imtl_l_follows_the_paper_and_comes_to_rest_where_scaled_losses_are_1() -> None:
    adam = Adam(3, 0.025)
    for step, found in enumerate(run(IMTLL(PARTS), range(20))):
        np.testing.assert_allclose(by_task(found), np.exp(adam.x), rtol=1e-9)
        adam.step(np.exp(adam.x) * totals(step) - 1)
    *_, last = run(IMTLL(PARTS), range(3000), lambda _: drawn(0))
    np.testing.assert_allclose(by_task(last) * totals(0), 1, rtol=1e-3)


def test_uncertainty_comes_to_rest_at_half_the_inverse_of_the_losses() -> None:
    *_, last = run(METHODS["uncertainty"](PARTS), range(4000), lambda _: drawn(0))
    np.testing.assert_allclose(by_task(last) * totals(0), 0.5, rtol=1e-3)


def test_geometric_mean_is_its_derivative() -> None:
    for step, found in enumerate(run(GeometricMean(PARTS), range(3))):
        values = totals(step)
        np.testing.assert_allclose(by_task(found), np.prod(values) ** (1 / 3) / (3 * values), rtol=1e-9)


def test_dwa_compares_the_last_two_windows() -> None:
    found = run(DynamicWeightAverage(PARTS, temperature=0.7, period=2), range(8))
    means = [np.mean([totals(2 * window), totals(2 * window + 1)], axis=0) for window in range(4)]
    for step in range(8):
        window = step // 2
        ratios = np.ones(3) if window < 2 else means[window - 1] / means[window - 2]
        np.testing.assert_allclose(by_task(found[step]), 3 * softmax(ratios / 0.7), rtol=1e-9)


def test_rlw_draws_from_seed_and_step() -> None:
    found = np.array([by_task(row) for row in run(RandomLossWeighting(PARTS, seed=1), range(2000))])
    np.testing.assert_allclose(found.sum(axis=1), 3, rtol=1e-12)
    np.testing.assert_allclose(found.mean(axis=0), 1, atol=0.05)
    assert (found.std(axis=0) > 0.3).all()
    other = by_task(run(RandomLossWeighting(PARTS, seed=2), [0])[0])
    assert not np.allclose(found[0], other)


@pytest.mark.parametrize("every", [1, 3])
def test_famo_follows_its_algorithm(every: int) -> None:
    adam = Adam(3, 0.025, 0.001)
    for step, found in enumerate(run(FAMO(PARTS, every=every), range(12))):
        before, z = totals(step) + 1e-8, softmax(adam.x)
        c = 1 / (z / before).sum()
        np.testing.assert_allclose(by_task(found), 3 * c * z / before, rtol=1e-9)
        if (step + 1) % every == 0:
            parts = {part: 0.9 * value - 0.01 * step for part, value in drawn(step).items()}
            after = np.array(
                [parts["detection/cls"] + parts["detection/loc"], parts["mask/bce"], parts["depth/regression"]]
            )
            delta = np.log(before) - np.log(after + 1e-8)
            adam.step((np.diag(z) - np.outer(z, z)) @ delta)


@pytest.mark.parametrize("name", METHODS)
def test_the_scalar_back_propagates_the_factors(name: str) -> None:
    """Of this rank's losses, which need not be the global ones."""
    balancer = METHODS[name](PARTS, {"mask": 0.5, "detection/loc": 3.0})
    own = {part: torch.tensor(float(index), requires_grad=True) for index, part in enumerate(PARTS)}
    scalar = balancer(own, drawn(0), valid())
    scalar.backward()
    factors = balancer.weights()
    assert {part: pytest.approx(loss.grad.item(), rel=1e-6) for part, loss in own.items()} == factors
    assert factors["detection/loc"] == pytest.approx(3 * factors["detection/cls"])
    assert scalar.item() == pytest.approx(sum(factors[part] * index for index, part in enumerate(PARTS)), rel=1e-6)
    logged = balancer.scalars()
    assert set(logged) == (set() if name == "sum" else {f"weight/{task}" for task in TASKS})
    assert all(2 * factors["mask/bce"] == pytest.approx(value) for key, value in logged.items() if key == "weight/mask")


@pytest.mark.parametrize("name", METHODS)
def test_fixed_weights_are_units_of_the_losses(name: str) -> None:
    """A task with weight 0.5 is treated like one whose loss is half as large."""
    weighted = run(METHODS[name](PARTS, {"mask": 0.5}), range(7))
    halved = run(METHODS[name](PARTS), range(7), lambda step: {**drawn(step), "mask/bce": drawn(step)["mask/bce"] / 2})
    if name == "famo":  # `run` takes a constant from what is seen again, which is no unit
        weighted, halved = weighted[:2], halved[:2]
    for one, other in zip(weighted, halved):
        assert one == pytest.approx({**other, "mask/bce": other["mask/bce"] / 2})


@pytest.mark.parametrize("name", [name for name in METHODS if name not in NOT_SYMMETRIC])
def test_the_order_of_tasks_does_not_matter(name: str) -> None:
    found = run(METHODS[name](PARTS), range(9))
    turned = run(METHODS[name](PARTS[::-1]), range(9))
    for one, other in zip(found, turned):
        assert one == pytest.approx(other, rel=1e-9)


@pytest.mark.parametrize("name", METHODS)
def test_an_absent_task_is_left_out(name: str) -> None:
    """The others go on as if it did not exist, and its own state stays."""
    balancer = METHODS[name](PARTS)
    run(balancer, range(5))
    before = {key: value for key, value in balancer.named_parameters() if "depth" in key}
    kept = {key: value.clone() for key, value in before.items()}
    found = run(balancer, range(5, 9), drawn, "depth")
    assert all(torch.equal(value, kept[key]) for key, value in before.items())
    assert all(row["depth/regression"] == 1.0 for row in found)
    if name not in ("rlw", "famo", "dwa"):  # whose weights have a memory of all tasks together
        alone = METHODS[name](PARTS[:3])
        without = run(alone, range(4), lambda step: drawn(step + 5, PARTS[:3]))
        fresh = run(METHODS[name](PARTS), range(5, 9), drawn, "depth")
        for one, other in zip(fresh, without):
            assert {part: one[part] for part in PARTS[:3]} == pytest.approx(other)
    for row in found:
        assert all(np.isfinite(value) and value >= 0 for value in row.values())


@pytest.mark.parametrize("name", METHODS)
def test_a_batch_without_any_label_changes_nothing(name: str) -> None:
    balancer = METHODS[name](PARTS)
    run(balancer, range(5))
    values = {key: value.clone() for key, value in balancer.named_parameters()}
    found = run(balancer, range(5, 7), drawn, *TASKS)
    assert all(row == dict.fromkeys(PARTS, 1.0) for row in found)
    assert all(torch.equal(value, values[key]) for key, value in balancer.named_parameters())


@pytest.mark.parametrize("name", METHODS)
def test_one_task_has_a_finite_positive_weight(name: str) -> None:
    parts = PARTS[:2]
    for row in run(METHODS[name](parts), range(6), lambda step: drawn(step, parts)):
        assert row["detection/cls"] == row["detection/loc"] > 0
        if name not in ("uncertainty", "imtl_l"):
            assert row["detection/cls"] == pytest.approx(1.0)


@pytest.mark.parametrize("name", METHODS)
def test_losses_of_0_give_finite_weights(name: str) -> None:
    for row in run(METHODS[name](PARTS), range(6), lambda step: {**drawn(step), "mask/bce": 0.0}):
        assert all(np.isfinite(value) for value in row.values())


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("cut", [1, 4, 5])
def test_a_resumed_run_goes_on_exactly(name: str, cut: int) -> None:
    whole = run(METHODS[name](PARTS), range(10))
    first = METHODS[name](PARTS)
    run(first, range(cut))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = METHODS[name](PARTS)
    second.load_state_dict(torch.load(file, weights_only=True))
    assert run(second, range(cut, 10)) == whole[cut:]


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: WeightedSum(PARTS, {"masks": 1.0}), r"balancing\.weights: no loss 'masks'; did you mean 'mask'\?"),
        (lambda: IMTLL(PARTS, {"mask": -1.0}), r"balancing\.weights\.mask=-1\.0: expected a number of at least 0"),
        (lambda: UncertaintyWeighting(PARTS, regression=["dept"]), r"balancing\.regression: .*did you mean 'depth'"),
        (lambda: DynamicWeightAverage(PARTS, temperature=0), r"balancing\.temperature=0: expected a number above 0"),
        (lambda: DynamicWeightAverage(PARTS, period=0), r"balancing\.period=0: expected"),
        (lambda: FAMO(PARTS, every=0), r"balancing\.every=0: expected a whole number of at least 1"),
    ],
)
def test_settings_that_do_not_fit_are_told(make: Callable[[], Scalarizer], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        make()
