"""What the network says of annotated boxes, beside its detections and from the same features."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from fakes import LABELS, FakeEvaluator, FakeNetwork, batches, records
from reference import randomise_statistics
from tiny import make_sample, region_tasks, tiny_model
from torch import Tensor

from mtl_rcnn.data.target import GivenBoxes, Prediction
from mtl_rcnn.data.views import Views
from mtl_rcnn.evaluation.inference import predict_dataset
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.views import MultiViewNetwork


@pytest.fixture(scope="module")
def model() -> MultiTaskRCNN:
    model = tiny_model(region_tasks(), "tasks.detection.score_thresh=0.3")
    randomise_statistics(model, seed=7)
    return model.eval()


def given(prediction: Prediction) -> GivenBoxes:
    return GivenBoxes(prediction["boxes"], prediction["classes"])


def assert_described(found: Prediction, expected: Prediction) -> None:
    """Equal but for the scores; boxes went to the network's frame and back."""
    assert set(found) == set(expected)
    assert torch.equal(found["scores"], torch.ones_like(expected["scores"]))
    for name in set(expected) - {"scores"}:
        if expected[name].dtype == torch.bool:
            assert (found[name] != expected[name]).float().mean() < 1e-3, name
        elif "keypoints" in name:  # a place of the heat map's grid; another box of the size of a rounding error
            assert ((found[name] - expected[name]).abs() < 0.1).float().mean() > 0.95
        else:
            torch.testing.assert_close(found[name].float(), expected[name].float(), atol=2e-3, rtol=1e-3)


def test_detections_given_back_are_described_as_before(model: MultiTaskRCNN) -> None:
    samples = [make_sample(seed, size, 0) for seed, size in enumerate([(64, 96), (96, 72), (64, 64)])]
    plain = model(samples)
    runs: list[Tensor] = []
    handle = model.backbone.register_forward_hook(lambda *_: runs.append(torch.ones(1)))
    kept = [given(plain[0]), given({name: value[:0] for name, value in plain[1].items()}), given(plain[2])]
    predictions, described = model.predict_with_given(samples, kept)
    handle.remove()
    assert len(runs) == 1, "the trunk runs once"
    assert len(plain[0]["boxes"]) > 10
    for one, expected in zip(predictions, plain):
        assert all(torch.equal(one[name], value) for name, value in expected.items())
    assert_described(described[0], plain[0])
    assert_described(described[2], plain[2])
    assert {name: value.shape for name, value in described[1].items()} == {
        name: value[:0].shape for name, value in plain[1].items()
    }


@pytest.mark.parametrize("flip", [False, True])
def test_several_views_describe_boxes_as_they_describe_their_detections(model: MultiTaskRCNN, flip: bool) -> None:
    image = np.kron(np.random.default_rng(0).integers(0, 256, (9, 12, 3), dtype=np.uint8), np.ones((8, 8, 1), np.uint8))
    network, sample = MultiViewNetwork(InferenceNetwork(model)), Views([[]], flip).sample(image)
    (plain,) = network([sample])
    (prediction,), (described,) = network.predict_with_given([sample], [given(plain)])
    assert len(plain["boxes"]) > 10
    assert all(torch.equal(prediction[name], value) for name, value in plain.items())
    assert_described(described, plain)


class Curious(FakeEvaluator):
    """Also has a row per annotated box."""

    on_truth = True

    def truth_rows(self, record, annotations, prediction):
        return [
            {"image_id": record["image_id"], "annotation_id": entry["id"], "value": box[0]}
            for entry, box in zip(annotations, prediction["boxes"].tolist(), strict=True)
        ]


class Describer(FakeNetwork):
    """Says of a given box where it is."""

    def predict_with_given(self, batch, given):
        return self(batch), [{"boxes": one.boxes, "classes": one.classes} for one in given]


def annotated(count: int) -> list[dict]:
    boxes = [[2, 3, 5, 4], [-3, -2, 6, 30], [4, 4, 0.001, 3], [30, 3, 5, 5], [1, 1, 2, 2]]
    dataset = records(count)
    for record in dataset:
        record["annotations"] = [
            {"id": record["image_id"] * 10 + n, "bbox": box, "category_id": 0, "iscrowd": int(n == 4)}
            for n, box in enumerate(boxes)
        ]
    return dataset


def evaluators(dataset):
    return {"plain": FakeEvaluator("plain", LABELS, dataset), "curious": Curious("curious", LABELS, dataset)}


def test_rows_of_annotated_boxes_stand_behind_the_detections():
    dataset = annotated(3)
    rows = predict_dataset(Describer(), batches(dataset), evaluators(dataset))
    plain = predict_dataset(FakeNetwork(), batches(dataset), {"plain": evaluators(dataset)["plain"]})
    assert rows["plain"] == plain["plain"]
    # Image 100 has one detection. Boxes are clipped; those of nothing, outside, or of crowds are not looked at.
    assert [tuple(row.values()) for row in rows["curious"][:3]] == [(100, 100.0), (100, 1000, 2.0), (100, 1001, 0.0)]
    assert [row["annotation_id"] for row in rows["curious"] if "annotation_id" in row][-2:] == [980, 981]


def _rank(rank, rendezvous, out):
    dist.init_process_group("gloo", init_method=rendezvous, rank=rank, world_size=2)
    dataset = annotated(5)
    rows = predict_dataset(Describer(), batches(dataset[rank::2]), evaluators(dataset))
    (out / f"rank{rank}.json").write_text(json.dumps(rows))
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_give_the_rows_of_one(tmp_path):
    mp.spawn(_rank, args=(f"file://{tmp_path}/rendezvous", tmp_path), nprocs=2)
    first, second = (json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(2))
    dataset = annotated(5)
    assert first == predict_dataset(Describer(), batches(dataset), evaluators(dataset))
    assert second is None


def test_an_evaluator_that_wants_them_must_take_them():
    class Forgetful(FakeEvaluator):
        on_truth = True

    dataset = annotated(1)
    with pytest.raises(NotImplementedError, match="Forgetful wants annotated boxes"):
        predict_dataset(Describer(), batches(dataset), {"one": Forgetful("one", LABELS, dataset)})
