"""Labelled, absent and empty are three different things, per image and per instance."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, Instances
from tiny import make_sample, need_tasks, tiny_model
from torch import Tensor

from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.rpn import ignored
from mtl_rcnn.modeling.sampling import LabelSampler
from mtl_rcnn.modeling.slots import DetectorSample

SIZE = (96, 128)
TASKS = ("detection", "mask", "keypoint")
EVERY_TASK = dict.fromkeys(TASKS, True)


@pytest.fixture
def model() -> MultiTaskRCNN:
    # Constant statistics: an image must not act on another through batch norm.
    return tiny_model(TASKS, "model.backbone.norm=FrozenBN").train()


def sums(model: MultiTaskRCNN, *samples: dict) -> dict[str, tuple[float, float]]:
    losses, _ = model(list(samples))
    return {name: (value.item(), count.item()) for name, (value, count) in losses.items()}


def test_an_image_without_box_labels_changes_no_region_loss(model: MultiTaskRCNN) -> None:
    labelled = make_sample(1, SIZE, 4)
    nothing = make_sample(2, SIZE, 3, labelled=dict.fromkeys(TASKS, False))
    alone, together = sums(model, labelled), sums(model, nothing, labelled)
    for name, (value, count) in alone.items():
        assert together[name][1] == count
        assert together[name][0] == pytest.approx(value, rel=1e-5)


def test_an_image_labelled_empty_trains_as_a_negative(model: MultiTaskRCNN) -> None:
    labelled = make_sample(1, SIZE, 4)
    alone, together = sums(model, labelled), sums(model, labelled, make_sample(2, SIZE, 0))
    for part in ("rpn_cls", "cls"):
        assert together[f"detection/{part}"][0] > alone[f"detection/{part}"][0]
        assert together[f"detection/{part}"][1] == 2 * alone[f"detection/{part}"][1]
    assert together["mask/bce"][1] == alone["mask/bce"][1]


def test_instances_without_a_mask_train_no_mask_and_their_placeholder_is_never_read(model: MultiTaskRCNN) -> None:
    has = torch.tensor([True, False, True, False])
    partly = make_sample(1, SIZE, 4, has_mask=has)
    full = make_sample(1, SIZE, 4)
    spoilt = make_sample(1, SIZE, 4, has_mask=has)
    spoilt["instances"].gt_masks.polygons[1][0][:] = np.nan
    part, whole = sums(model, partly), sums(model, full)
    assert 0 < part["mask/bce"][1] < whole["mask/bce"][1]
    assert sums(model, spoilt) == part
    for name in part:
        if not name.startswith("mask/"):
            assert part[name] == whole[name]


def test_switching_a_task_on_leaves_the_others_losses_and_weights_alone() -> None:
    need_tasks(*TASKS)
    samples = [make_sample(1, SIZE, 4), make_sample(2, SIZE, 3)]
    few = tiny_model(("detection", "mask"), "model.backbone.norm=FrozenBN").train()
    many = tiny_model(TASKS, "model.backbone.norm=FrozenBN").train()
    shared = few.state_dict()
    assert all(torch.equal(value, many.state_dict()[name]) for name, value in shared.items())
    with_fewer, with_more = sums(few, *samples), sums(many, *samples)
    assert with_fewer == {name: with_more[name] for name in with_fewer}


def test_background_of_a_data_set_that_labels_only_some_classes() -> None:
    model = tiny_model(("detection",))
    detector = model.roi_heads.detector
    logits = torch.tensor([[1.0, 2.0, 0.5], [0.3, -1.0, 2.0]], dtype=torch.float64)
    regions = Instances(SIZE)
    regions.gt_classes = torch.tensor([2, 0])  # background, class 0
    regions.proposal_boxes = Boxes(torch.tensor([[0.0, 0.0, 9.0, 9.0]] * 2))
    regions.labelled_classes = torch.tensor([[True, False]] * 2)  # class 1 is visible but not annotated
    found, count = detector.losses((logits, torch.zeros(2, 8)), [regions])["cls"]
    p = np.exp(logits.numpy()) / np.exp(logits.numpy()).sum(axis=1, keepdims=True)
    assert count == 2
    assert found.item() == pytest.approx(-np.log(p[0, 2] + p[0, 1]) - np.log(p[1, 0]), rel=1e-6)


def test_partly_labelled_classes_give_no_negative_anchors(model: MultiTaskRCNN) -> None:
    some = make_sample(1, SIZE, 4)
    some["labelled_classes"] = torch.tensor([True, False])
    anchors = Boxes(torch.tensor([[100.0, 70.0, 110.0, 80.0], *some["instances"].gt_boxes.tensor.tolist()]))
    labels, _ = model.roi_heads.detector.rpn._label_anchors(anchors, _detector_sample(some))
    assert (labels == 0).sum() == 0
    assert (labels == 1).sum() == 4


def test_crowds_under_ignore_are_neither_object_nor_background(model: MultiTaskRCNN) -> None:
    sample = make_sample(1, SIZE, 0)
    anchors = Boxes(torch.tensor([[0.0, 0.0, 20.0, 20.0], [60.0, 60.0, 80.0, 80.0]]))
    assert _labels(model, anchors, sample).tolist() == [0, 0]
    sample["ignore_boxes"] = torch.tensor([[0.0, 0.0, 18.0, 30.0]])
    assert _labels(model, anchors, sample).tolist() == [-1, 0]
    assert ignored(anchors, torch.tensor([[0.0, 0.0, 9.0, 20.0]])).tolist() == [False, False]


def test_keyed_draws_depend_on_the_sample_and_on_nothing_else() -> None:
    sampler = LabelSampler("keyed", seed=7)
    labels = torch.cat([torch.ones(40), torch.zeros(200)]).long()

    def draw(sample_index: int, stage: int = 0) -> tuple[list[int], list[int]]:
        positive, negative = sampler(labels, 32, 0.25, 0, sample_index, stage)
        return positive.tolist(), negative.tolist()

    first = draw(3)
    torch.rand(5)
    assert draw(3) == first
    assert draw(4) != first
    assert draw(3, stage=1) != first
    assert len(first[0]) == 8
    assert len(first[1]) == 24


def _labels(model: MultiTaskRCNN, anchors: Boxes, sample: dict) -> Tensor:
    return model.roi_heads.detector.rpn._label_anchors(anchors, _detector_sample(sample))[0]


def _detector_sample(sample: dict) -> DetectorSample:
    return DetectorSample(
        sample["instances"], sample["ignore_boxes"], sample["labelled_classes"], sample["sample_index"]
    )
