"""The arithmetic of tools/plan.py against figures worked out by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mtl_rcnn.engine.forecast import Costs, Links, Run, all_reduce_seconds, forecast

LINKS = Links(within_node=100e9, between_nodes=10e9, latency=20e-6)
COSTS = Costs(step_seconds={2: 0.3, 4: 0.5}, load_seconds=0.05, evaluation_seconds=0.1, gradient_bytes=160_000_000)
RUN = Run(batch_size=16, iterations=1000, epoch_images=8000, evaluated_images=400, evaluations=5, workers=4)


def test_a_ring_sends_nearly_twice_the_gradients_over_its_slowest_link() -> None:
    """160 MB in 7 buckets; four ranks send 1.5 times as much, in 6 messages a bucket."""
    assert all_reduce_seconds(160_000_000, 1, 4, LINKS) == pytest.approx(240e6 / 100e9 + 7 * 6 * 20e-6)
    assert all_reduce_seconds(160_000_000, 2, 4, LINKS) == pytest.approx(240e6 / 10e9 + 7 * 6 * 20e-6)
    assert all_reduce_seconds(160_000_000, 1, 1, LINKS) == 0


def test_hours_of_a_run_that_computes() -> None:
    found = forecast(COSTS, RUN, 2, 4, LINKS)
    sending = 0.024 + 0.00084
    assert found.share == 4
    assert found.communication_seconds == pytest.approx(sending)
    assert found.bound == "computing"
    assert found.step_seconds == pytest.approx((0.5, 0.5 + sending))
    assert found.epoch_seconds == pytest.approx((500 * 0.5, 500 * (0.5 + sending)))
    evaluating = 5 * 100 * 0.1
    assert found.hours == pytest.approx(((500 + evaluating) / 3600, (500 + 1000 * sending + evaluating) / 3600))


def test_a_step_waits_for_its_readers() -> None:
    slow = replace(COSTS, load_seconds=0.6)
    found = forecast(slow, RUN, 1, 4, LINKS)
    assert found.bound == "reading"
    assert found.step_seconds[0] == pytest.approx(4 * 0.6 / 4)
    alone = forecast(slow, replace(RUN, workers=0), 1, 4, LINKS)  # reads, then computes
    assert alone.step_seconds[0] == pytest.approx(4 * 0.6 + 0.5)


def test_a_slow_network_is_named_and_no_step_is_shorter() -> None:
    found = forecast(COSTS, RUN, 4, 8, replace(LINKS, between_nodes=0.5e9))
    assert found.bound == "communicating"
    assert found.step_seconds == pytest.approx((found.communication_seconds, 0.3 + found.communication_seconds))
    assert found.communication_seconds > 0.5


def test_a_share_that_was_not_measured() -> None:
    with pytest.raises(KeyError):
        forecast(COSTS, RUN, 2, 2, LINKS)
