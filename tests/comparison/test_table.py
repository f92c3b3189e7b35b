"""delta_m against published numbers, and what is noise."""

from __future__ import annotations

import pytest
from omegaconf import OmegaConf

from mtl_rcnn.comparison.plan import Network
from mtl_rcnn.comparison.table import Row, Spread, apart, delta_m, is_noise, relative, with_deltas
from mtl_rcnn.comparison.words import csv_text, markdown, spread_text, table, verdicts

METRICS = {"a": "AP", "b": "rmse"}
UP = {"a": True, "b": False}


def spreads(**values: float) -> dict[str, Spread]:
    return {task: Spread((value,)) for task, value in values.items()}


def network(name: str, tasks: tuple[str, ...], own_of: str | None = None, method: str | None = None) -> Network:
    return Network(name, name, tasks, OmegaConf.create({}), own_of, method)


def row(made: Network, a: tuple[float, ...] = (), b: tuple[float, ...] = (), seeds: int = 3) -> Row:
    scores = {task: Spread(values) for task, values in (("a", a), ("b", b)) if values}
    return Row(made, tuple(range(seeds)), scores, Spread((0.1,) * seeds), parameters=1_000_000, inference_ms=10.0)


def rows(joint: tuple[tuple[float, ...], tuple[float, ...]], *others: Row) -> list[Row]:
    own = [row(network("a", ("a",), "a"), a=(40.0, 41.0, 42.0)), row(network("b", ("b",), "b"), b=(2.0, 2.1, 1.9))]
    return with_deltas([*own, row(network("both", ("a", "b"), method="sum"), *joint), *others], UP)


def test_mask_rcnn_table_5() -> None:
    """Box, mask and keypoint AP of person: alone (mask and keypoint each with boxes), and together."""
    higher = dict.fromkeys(("box", "mask", "keypoint"), True)
    own = spreads(box=52.5, mask=45.8, keypoint=64.2)
    terms, delta = delta_m(spreads(box=52.0, mask=45.1, keypoint=64.7), own, higher)
    assert [round(terms[task].mean, 2) for task in higher] == [-0.95, -1.53, 0.78]
    assert round(delta.mean, 2) == -0.57


@pytest.mark.parametrize(
    ("scores", "expected"), [((50.1, 3.79, 0.592), 3.2), ((62.8, 3.61, 0.549), 13.9), ((63.4, 3.50, 0.522), 16.4)]
)
def test_uncertainty_weighting_table_1(scores: tuple[float, float, float], expected: float) -> None:
    """Segmentation IoU, and two errors of which less is better."""
    tasks = ("segmentation", "instances", "depth")
    higher = dict(zip(tasks, (True, False, False)))
    own, found = (spreads(**dict(zip(tasks, values))) for values in ((59.4, 4.61, 0.640), scores))
    assert round(delta_m(found, own, higher)[1].mean, 1) == expected


def test_a_term_is_the_sign_turned_when_the_direction_is() -> None:
    assert relative(3.0, 2.0, True) == 50.0 == -relative(3.0, 2.0, False)
    assert relative(-1.0, -2.0, True) == 50.0  # better although the baseline is negative


def test_the_deviation_is_that_of_single_trainings() -> None:
    assert Spread((1.0, 3.0)).deviation == pytest.approx(2**0.5)
    assert Spread((1.0,)).deviation is None
    assert spread_text(Spread((1.0, 3.0))) == "2.0 ± 1.4"


def test_a_baseline_of_zero_leaves_delta_open() -> None:
    terms, delta = delta_m(spreads(a=1.0, b=2.0), spreads(a=0.0, b=1.0), UP)
    assert delta is None
    assert set(terms) == {"b"}


def test_noise_is_within_the_larger_deviation() -> None:
    assert is_noise(Spread((9.0, 11.0)), Spread((11.3, 11.3)))
    assert not is_noise(Spread((9.0, 11.0)), Spread((11.5, 11.5)))
    assert is_noise(Spread((9.0,)), Spread((11.3, 11.3))) is None


def test_one_network_per_task_has_a_delta_of_zero_with_its_deviation() -> None:
    found = apart(rows(((40.0, 41.0, 42.0), (2.0, 2.0, 2.0))))
    assert found.mean == pytest.approx(0, abs=1e-9)
    by_seed = [
        (relative(a, 41.0, True) + relative(b, 2.0, False)) / 2 for a, b in ((40.0, 2.0), (41.0, 2.1), (42.0, 1.9))
    ]
    assert found.values == pytest.approx(by_seed)


def test_a_clear_gain_a_clear_loss_and_noise_are_told_apart() -> None:
    said = verdicts(rows(((50.0, 51.0, 52.0), (2.05, 2.0, 1.95))), METRICS)
    assert "better than one network per task" in said[0]
    assert "In the network both, a gains: AP 51.0 ± 1.0, in its own network 41.0 ± 1.0." in said
    assert any(line.startswith("1 other difference") and line.endswith("noise.") for line in said)
    said = verdicts(rows(((30.0, 31.0, 32.0), (3.0, 3.1, 2.9))), METRICS)
    assert "worse than one network per task" in said[0]
    assert any("b loses: rmse 3.00 ± 0.10" in line for line in said)
    assert (
        "as good as, within noise, one network per task" in verdicts(rows(((41.0, 41.1, 41.2), (2.0,) * 3)), METRICS)[0]
    )


def test_a_method_has_to_beat_the_plain_sum_by_more_than_the_noise() -> None:
    def method(name: str, a: float) -> Row:
        return row(network(name, ("a", "b"), method=name), (a - 1, a, a + 1), (2.0, 2.0, 2.0))

    plain = ((40.0, 41.0, 42.0), (2.0, 2.0, 2.0))
    assert verdicts(rows(plain, method("new", 41.5)), METRICS)[-1] == "Nothing beats the plain sum."
    assert verdicts(rows(plain, method("new", 35.0)), METRICS)[-1] == "Nothing beats the plain sum."
    said = verdicts(rows(plain, method("old", 41.5), method("new", 45.0)), METRICS)
    assert said[-1] == "new beats the plain sum."
    assert "old: delta_m +0.6 against the plain sum, noise; new: delta_m +4.9 against the plain sum, better" in said[-2]


def test_one_seed_says_that_it_cannot_tell() -> None:
    one = [row(network("a", ("a",), "a"), a=(40.0,), seeds=1), row(network("b", ("b",), "b"), b=(2.0,), seeds=1)]
    both = row(network("both", ("a", "b"), method="sum"), (42.0,), (2.0,), seeds=1)
    said = verdicts(with_deltas([*one, both], UP), METRICS)
    assert said[-1] == "Every network was trained with one seed: what of this is noise cannot be told."


def test_the_table_adds_up_what_one_network_per_task_costs() -> None:
    made = table(rows(((40.0, 41.0, 42.0), (2.0, 2.0, 2.0))), METRICS, UP)
    assert made.header == [
        "network",
        "a AP",
        "b rmse ↓",
        "delta_m (%)",
        "parameters (M)",
        "ms / training step",
        "ms / image",
    ]
    assert made.rows[0] == ["one network per task (2)", "41.0 ± 1.0", "2.00 ± 0.10", "0.0 ± 3.3", "2.00", "200", "20.0"]
    assert made.rows[3][:4] == ["both", "41.0 ± 1.0", "2.00 ± 0.00", "+0.0 ± 1.2"]
    assert markdown(made).splitlines()[1] == "| --- | ---: | ---: | ---: | ---: | ---: | ---: |"


def test_the_csv_has_a_line_per_training() -> None:
    lines = csv_text(rows(((40.0, 41.0, 42.0), (2.0, 2.0, 2.0))), METRICS).splitlines()
    assert len(lines) == 1 + 3 * 3
    assert lines[0].startswith("network,seed,a/AP,b/rmse,term/a,term/b,delta_m,")
    assert lines[7].split(",")[:4] == ["both", "0", "40", "2"]
    assert lines[1].split(",")[:4] == ["a", "0", "40", ""]
