"""Our box + mask + keypoint network against Detectron2's own GeneralizedRCNN: same weights, batch and draws,
difference 0."""

from __future__ import annotations

import pytest
import torch
from detectron2.utils.events import EventStorage
from reference import copy_weights, detectron2_rcnn, randomise_statistics
from tiny import make_sample, tiny_model

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.losses import reduce_losses

THEIRS = {
    "detection/rpn_cls": "loss_rpn_cls",
    "detection/rpn_loc": "loss_rpn_loc",
    "detection/cls": "loss_cls",
    "detection/box_reg": "loss_box_reg",
    "mask/bce": "loss_mask",
    "keypoint/heatmap": "loss_keypoint",
}
TASKS = ("detection", "mask", "keypoint")
ONE_RANK = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture
def batch() -> list[Sample]:
    return [make_sample(0, (96, 128), 4), make_sample(1, (128, 80), 3), make_sample(2, (64, 100), 0)]


def both_networks(*overrides: str, normalize_by_visible: bool = True) -> tuple[torch.nn.Module, torch.nn.Module]:
    shared = "+tasks.keypoint.shared_schemas.disc=figure"  # Detectron2 knows one schema, of every class
    same = ["model.backbone.width=64", "model.pixel_std=[1.0,1.0,1.0]", "model.sampling=global"]
    ours = tiny_model(TASKS, *same, shared, *overrides)
    randomise_statistics(ours, seed=1)
    theirs = detectron2_rcnn(2, 3, normalize_by_visible)
    copy_weights(ours, theirs)
    return ours, theirs


@pytest.mark.parametrize("normalize_by", ["visible", "regions"])
def test_losses_parity(batch: list[Sample], normalize_by: str) -> None:
    ours, theirs = both_networks(
        f"tasks.keypoint.normalize_by={normalize_by}",
        "tasks.keypoint.regions_per_image=8",
        normalize_by_visible=normalize_by == "visible",
    )
    torch.manual_seed(3)
    with EventStorage():
        expected = theirs.train()(batch)
    torch.manual_seed(3)
    sums, _ = ours.train()(batch)
    found = reduce_losses(sums, batch, ONE_RANK).losses
    assert set(found) == set(THEIRS)
    for name, value in found.items():
        assert value.item() == expected[THEIRS[name]].item(), name
        assert value.item() > 0, name


def test_gradients_parity(batch: list[Sample]) -> None:
    ours, theirs = both_networks()
    torch.manual_seed(3)
    with EventStorage():
        sum(theirs.train()(batch).values()).backward()
    torch.manual_seed(3)
    sums, _ = ours.train()(batch)
    torch.stack(list(reduce_losses(sums, batch, ONE_RANK).losses.values())).sum().backward()
    expected = torch.cat([p.grad.flatten() for p in theirs.backbone.parameters()])
    found = torch.cat([p.grad.flatten() for p in ours.backbone.parameters()])
    # Losses are added in another order, which changes the last bits of the trunk's gradient.
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-5)


def test_predictions_parity(batch: list[Sample]) -> None:
    ours, theirs = both_networks()
    with torch.no_grad():
        expected = [entry["instances"] for entry in theirs.eval()(batch)]
        found = ours.eval()(batch)
    assert sum(len(entry) for entry in expected) > 50
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine["boxes"], reference.pred_boxes.tensor)
        assert torch.equal(mine["scores"], reference.scores)
        assert torch.equal(mine["classes"], reference.pred_classes)
        assert torch.equal(mine["masks"], reference.pred_masks)
        assert torch.equal(mine["keypoints"], reference.pred_keypoints)
