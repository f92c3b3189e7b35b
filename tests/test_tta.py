"""Test-time augmentation against Detectron2's own, against none at all, and against the mirror."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.modeling import build_model
from detectron2.modeling.test_time_augmentation import DatasetMapperTTA, GeneralizedRCNNWithTTA
from reference import copy_weights, detectron2_config, randomise_statistics
from tiny import LABEL_SPACE, available_tasks, need_tasks, region_tasks, tiny_model
from torch import Tensor

from mtl_rcnn.data.target import Prediction
from mtl_rcnn.data.views import View, Views
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.roi_heads import build_pooler
from mtl_rcnn.modeling.slots import DecodedView, ImageTask, RoiTask
from mtl_rcnn.modeling.views import MultiViewNetwork

OWN_SIZE: list[list[T.Augmentation]] = [[]]


def network(tasks: Sequence[str], *overrides: str) -> MultiTaskRCNN:
    model = tiny_model(tasks, "tasks.detection.score_thresh=0.3", *overrides)
    randomise_statistics(model, seed=7)
    return model.eval()


def noise(height: int, width: int, seed: int = 0) -> np.ndarray:
    """(H, W, 3) uint8: coarse, so that resizing leaves something of it."""
    coarse = np.random.default_rng(seed).integers(0, 256, (height // 8, width // 8, 3), dtype=np.uint8)
    return np.kron(coarse, np.ones((8, 8, 1), dtype=np.uint8))


def resized(*short_edges: int) -> list[list[T.Augmentation]]:
    return [[T.ResizeShortestEdge(edge, 200)] for edge in short_edges]


def seen(model: MultiTaskRCNN, views: Views, image: np.ndarray) -> Prediction:
    return MultiViewNetwork(InferenceNetwork(model))([views.sample(image)])[0]


def plain(model: MultiTaskRCNN, view: View, image: np.ndarray) -> Prediction:
    return model.predict([{"image": view.image, "height": image.shape[0], "width": image.shape[1]}])[0]


@pytest.mark.parametrize("sizes", [OWN_SIZE, resized(64), resized(88)], ids=["own size", "smaller", "larger"])
def test_a_single_view_changes_nothing(sizes: list[list[T.Augmentation]]) -> None:
    model, views, image = network(available_tasks()), Views(sizes, flip=False), noise(72, 96)
    found, expected = seen(model, views, image), plain(model, views(image)[0], image)
    assert len(expected["boxes"]) > 10
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


def test_the_same_view_twice_changes_next_to_nothing() -> None:
    model, views, image = network(available_tasks()), Views([*resized(64), *resized(64)], flip=False), noise(72, 96)
    found, expected = seen(model, views, image), plain(model, views(image)[0], image)
    for name in ("boxes", "scores", "classes"):
        assert torch.equal(found[name], expected[name])
    for name, value in expected.items():
        torch.testing.assert_close(found[name].float(), value.float(), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("short_edges", "flip"), [((64,), False), ((72,), True), ((64, 96), False), ((64, 72, 96), True)]
)
def test_boxes_and_masks_equal_detectron2s(short_edges: tuple[int, ...], flip: bool) -> None:
    need_tasks("mask")
    same = ["model.backbone.width=64", "model.pixel_std=[1.0,1.0,1.0]", "tasks.detection.score_thresh=0.05"]
    model = network(("detection", "mask"), *same)
    with torch.no_grad():  # random weights of this size would saturate every score, and make every box the image
        model.roi_heads.detector.box_predictor.bbox_pred.weight.mul_(0.01)
        model.roi_heads.detector.box_predictor.cls_score.weight.mul_(0.005)
    cfg = detectron2_config(2, 0)
    theirs = build_model(cfg)
    copy_weights(model, theirs)
    merging = GeneralizedRCNNWithTTA(cfg, theirs.eval(), DatasetMapperTTA(list(short_edges), 200, flip), batch_size=1)
    for seed in range(3):
        image = noise(72, 96, seed)
        pixels = torch.as_tensor(np.ascontiguousarray(image[:, :, ::-1].transpose(2, 0, 1)))
        with torch.no_grad():
            expected = merging([{"image": pixels, "height": 72, "width": 96}])[0]["instances"]
        found = seen(model, Views(resized(*short_edges), flip), image)
        assert len(found["boxes"]) > 10
        assert 0.05 < found["scores"].mean() < 0.95
        assert torch.equal(found["classes"], expected.pred_classes)
        torch.testing.assert_close(found["scores"], expected.scores, atol=1e-6, rtol=0)
        torch.testing.assert_close(found["boxes"], expected.pred_boxes.tensor, atol=1e-4, rtol=0)
        assert (found["masks"] != expected.pred_masks).float().mean() < 1e-4


def test_views_bring_what_no_single_one_has() -> None:
    model, image = network(["detection"]), noise(72, 96)
    both = seen(model, Views(resized(56, 96), flip=True), image)
    single = [plain(model, view, image) for view in Views(resized(56, 96), flip=False)(image)]
    assert all(both["scores"].max() >= one["scores"].max() for one in single)
    union = torch.cat([one["scores"] for one in single])
    assert torch.isin(both["scores"], union).any()
    assert not torch.isin(both["scores"], union).all()


def test_a_mirrored_image_gives_the_mirror_image_of_its_results() -> None:
    model, views, image = network(available_tasks()), Views(OWN_SIZE, flip=True), noise(64, 96)
    found, mirrored = seen(model, views, image), seen(model, views, np.ascontiguousarray(image[:, ::-1]))
    assert len(found["boxes"]) > 10
    assert_mirrored(model, found, mirrored, 96)


def test_a_symmetric_image_gives_symmetric_results() -> None:
    half = noise(64, 48)
    image = np.concatenate([half, half[:, ::-1]], axis=1)
    model = network(region_tasks())
    found = seen(model, Views(OWN_SIZE, flip=True), image)
    boxes, scores = found["boxes"], found["scores"]
    pairs = 0
    for row, box in enumerate(boxes):
        mirror = torch.stack([96 - box[2], box[1], 96 - box[0], box[3]])
        near = (boxes - mirror).abs().max(dim=1).values < 1e-3
        same = torch.nonzero(near & (found["classes"] == found["classes"][row])).flatten()
        if len(same) == 0:  # itself suppressed the box that its mirror image gave
            continue
        pairs += int(same[0] != row)
        assert abs(scores[same[0]] - scores[row]) < 1e-5
        both = [{name: value[[index]] for name, value in found.items()} for index in (row, int(same[0]))]
        assert_mirrored(model, *both, 96)
    assert pairs >= 4


def assert_mirrored(model: MultiTaskRCNN, one: Prediction, other: Prediction, width: int) -> None:
    """Every output of one is the other's, left for right."""
    x0, y0, x1, y1 = other["boxes"].unbind(dim=1)
    torch.testing.assert_close(one["scores"], other["scores"], atol=1e-5, rtol=0)
    torch.testing.assert_close(one["boxes"], torch.stack([width - x1, y0, width - x0, y1], dim=1), atol=1e-3, rtol=0)
    if "masks" in one:
        assert (one["masks"] != other["masks"].flip(2)).float().mean() < 1e-3
    if "keypoints" in one:
        mirror = model.roi_heads.tasks["keypoint"].schemas[0].mirror
        assert mirror == (1, 0, 2)
        points = other["keypoints"][:, list(mirror)]
        owned = one["classes"] == 0
        if not owned.any():
            return
        # The decoder picks one of the heat map's cells in image pixels: the mirror of a cell may be its neighbour.
        assert ((width - points[owned, :, 0]) - one["keypoints"][owned, :, 0]).abs().max() < 1.5
        assert (points[owned, :, 1] - one["keypoints"][owned, :, 1]).abs().max() < 1.5


@pytest.mark.parametrize("task", [name for name in region_tasks() if name != "detection"])
def test_raw_outputs_are_mirrored_back_and_averaged(task: str) -> None:
    head = network(["detection", task]).roi_heads.tasks[task]
    shape = head.pooled_shape
    raw = head(torch.randn(5, shape.channels, shape.height, shape.width, generator=torch.Generator().manual_seed(0)))
    assert torch.equal(head.unflip(head.unflip(raw)), raw)
    assert not torch.equal(head.unflip(raw), raw)
    torch.testing.assert_close(head.average([raw, raw, raw]), raw, atol=1e-4, rtol=1e-4)


class Brightness(ImageTask):
    """Mean feature per image; says how views are merged."""

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        return features["p2"].mean(dim=(1, 2, 3))

    def decode(self, raw: Tensor, padded_size: Tensor) -> dict[str, Tensor]:
        return {"brightness": raw, "padded": padded_size[None]}

    def merge_views(self, views: list[DecodedView], image_size: Tensor) -> dict[str, Tensor]:
        return {
            "brightness": torch.stack([view.decoded["brightness"] for view in views]),
            "sizes": torch.stack([view.network_size for view in views]),
            "padded": torch.stack([view.decoded["padded"] for view in views]),
            "mirrored": torch.tensor([view.mirrored for view in views]),
            "image_size": image_size,
        }


class Silent(ImageTask):
    """Does not say it."""

    forward, decode = Brightness.forward, Brightness.decode


class Stubborn(RoiTask):
    """Does not say how it is mirrored back."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.mean(dim=(1, 2, 3))


def with_image_task(kind: type[ImageTask]) -> MultiTaskRCNN:
    model = network(["detection"])
    model.image_tasks["extra"] = kind("extra", LABEL_SPACE, model.backbone.output_shape())
    return model


def test_an_image_task_merges_its_views_itself() -> None:
    found = seen(with_image_task(Brightness), Views(resized(40, 64), flip=True), noise(72, 96))
    assert found["sizes"].tolist() == [[40, 53], [40, 53], [64, 85], [64, 85]]
    assert found["padded"].tolist() == [[64, 64], [64, 64], [64, 96], [64, 96]]
    assert found["mirrored"].tolist() == [False, True, False, True]
    assert found["image_size"].tolist() == [72, 96]
    assert len(found["brightness"].unique()) == 4
    assert len(found["boxes"]) > 10


def test_a_task_that_cannot_says_so() -> None:
    with pytest.raises(ConfigError, match=r"the task 'extra' does not say how several views .*Silent\.merge_views"):
        seen(with_image_task(Silent), Views(resized(40, 64), flip=False), noise(72, 96))
    model = network(["detection"])
    task = Stubborn("extra", LABEL_SPACE, model.backbone.output_shape(), pooler_resolution=7)
    model.roi_heads.tasks["extra"] = task
    model.roi_heads.poolers["extra"] = build_pooler(task, model.backbone.output_shape())
    with pytest.raises(ConfigError, match=r"tta\.flip=true: the task 'extra' does not say .*Stubborn\.unflip"):
        seen(model, Views(OWN_SIZE, flip=True), noise(72, 96))


def test_an_image_without_anything() -> None:
    model = network(available_tasks())
    model.roi_heads.detector.score_thresh = 1.0
    found = seen(model, Views(resized(40, 64), flip=True), noise(72, 96))
    expected = plain(model, Views(OWN_SIZE, flip=False)(noise(72, 96))[0], noise(72, 96))
    assert {name: value.shape for name, value in found.items()} == {n: v.shape for n, v in expected.items()}
    assert len(found["boxes"]) == 0


def test_views_are_resized_then_mirrored() -> None:
    image = noise(72, 96)
    views = Views(resized(72, 36), flip=True, input_format="RGB")(image)
    assert [tuple(view.image.shape) for view in views] == [(3, 72, 96), (3, 72, 96), (3, 36, 48), (3, 36, 48)]
    assert [view.mirrored for view in views] == [False, True, False, True]
    assert (views[0].image.numpy() == image.transpose(2, 0, 1)).all()
    assert torch.equal(views[3].image, views[2].image.flip(2))
    bgr = Views(resized(72), flip=False)(image)[0]
    assert torch.equal(bgr.image, views[0].image.flip(0))
