"""Every image once, rows in the order of the records, the same on one and on two ranks; files beside them."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import LABELS, FakeEvaluator, FakeNetwork, batches, records

from mtl_rcnn.errors import DataError
from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.inference import EvaluationSet, evaluate, predict_dataset


def evaluators(dataset):
    return {"first": FakeEvaluator("first", LABELS, dataset), "second": FakeEvaluator("second", LABELS, dataset)}


def test_rows_follow_the_records_whatever_the_loader_does():
    dataset = records(7)
    straight = predict_dataset(FakeNetwork(), batches(dataset), evaluators(dataset))
    shuffled = predict_dataset(FakeNetwork(), batches(dataset[::-1], size=3), evaluators(dataset))

    expected = [100 - n for n in range(7) for _ in range((100 - n) % 3)]
    assert [row["image_id"] for row in straight["first"]] == expected
    assert straight == shuffled
    assert set(straight) == {"first", "second"}


def test_the_network_evaluates_without_gradients_and_gets_every_mode_back():
    dataset, network = records(3), FakeNetwork()
    network.train()
    network.frozen.eval()

    predict_dataset(network, batches(dataset), evaluators(dataset))

    assert network.modes == [(False, False)] * 2
    assert network.training
    assert network.linear.training
    assert not network.frozen.training


def test_modes_come_back_after_a_fault_too():
    network = FakeNetwork().train()
    with pytest.raises(DataError, match="the loader gave image 5, which is not in it"):
        predict_dataset(network, [[{"image_id": 5}]], evaluators(records(3)))
    assert network.training


@pytest.mark.parametrize(
    ("positions", "text"),
    [([0, 1, 2, 2], "1 never evaluated|0 never evaluated and 1 .98. evaluated"), ([0, 1], r"1 \(98\) never evaluated")],
)
def test_an_image_seen_twice_or_never_is_an_error(positions, text):
    dataset = records(3)
    with pytest.raises(DataError, match=text):
        predict_dataset(FakeNetwork(), batches([dataset[n] for n in positions]), evaluators(dataset), name="toy")


def test_images_a_loader_left_out_as_unreadable_have_no_rows(caplog):
    dataset = records(3)

    class Loader(list):
        excluded = {"0.jpg": SimpleNamespace(image_id=100)}

    rows = predict_dataset(FakeNetwork(), Loader(batches(dataset[1:])), evaluators(dataset), name="toy")

    assert [row["image_id"] for row in rows["first"]] == [98, 98]
    assert "toy: unreadable images 1 (100) count as images without detections" in caplog.text


def test_metrics_and_files(tmp_path):
    dataset = records(4)
    entry = EvaluationSet("toy", batches(dataset), evaluators(dataset))
    silent = EvaluationSet("silent", batches(dataset[1:2]), {"first": FakeEvaluator("first", LABELS, dataset[1:2])})

    metrics = evaluate(FakeNetwork(), [entry, silent], tmp_path)

    assert metrics["toy/first/error"] == Metric(pytest.approx(98.5), higher_is_better=False)
    assert metrics["silent/first/error"] == Metric(0.0, higher_is_better=False, reason="no rows")
    values = json.loads((tmp_path / "metrics.json").read_text())
    assert values == {"toy/first/error": 98.5, "toy/second/error": 98.5, "silent/first/error": 0.0}
    info = json.loads((tmp_path / "metrics_info.json").read_text())
    assert info["silent/first/error"] == {"higher_is_better": False, "reason": "no rows"}
    rows = json.loads((tmp_path / "predictions" / "toy_first.json").read_text())
    assert [row["image_id"] for row in rows] == [100, 98, 98, 97]
    assert sorted(path.name for path in tmp_path.rglob("*") if path.is_file()) == [
        "evaluated.json",
        "metrics.json",
        "metrics_info.json",
        "silent_first.json",
        "toy_first.json",
        "toy_second.json",
    ]


def test_a_metric_that_is_not_finite_is_refused():
    class Broken(FakeEvaluator):
        def metrics(self, rows):
            return {"AP": Metric(float("nan"))}

    dataset = records(2)
    with pytest.raises(ValueError, match="evaluator of 'broken' gave AP = nan"):
        evaluate(FakeNetwork(), [EvaluationSet("toy", batches(dataset), {"broken": Broken("broken", LABELS, dataset)})])


def test_progress_is_logged(caplog):
    caplog.set_level(logging.INFO)
    dataset = records(3)
    predict_dataset(FakeNetwork(), batches(dataset), evaluators(dataset), name="toy")
    assert "evaluating toy: 3 images in 0:00:00" in caplog.text


def _rank(rank, rendezvous, out):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    torch.set_num_threads(1)
    dataset = records(7)
    rows = predict_dataset(FakeNetwork(), batches(dataset[rank::2]), evaluators(dataset))
    assert (rows is None) == (rank == 1)
    entry = EvaluationSet("toy", batches(dataset[rank::2]), evaluators(dataset))
    metrics = evaluate(FakeNetwork(), [entry], out)
    assert (out / "metrics.json").exists(), "the files exist on every rank when evaluate returns"
    seen = {"rows": rows, "metrics": {key: metric.value for key, metric in metrics.items()}}
    (out / f"rank{rank}.json").write_text(json.dumps(seen))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_give_the_rows_of_one(tmp_path):
    mp.spawn(_rank, args=(f"file://{tmp_path}/rendezvous", tmp_path), nprocs=2)

    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    dataset = records(7)
    assert first["rows"] == predict_dataset(FakeNetwork(), batches(dataset), evaluators(dataset))
    assert first["metrics"] == json.loads((tmp_path / "metrics.json").read_text())
    assert len(first["metrics"]) == 2
    assert second == {"rows": None, "metrics": {}}
