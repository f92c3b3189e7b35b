"""The parallel RoIAlign equals torchvision's, bit for bit."""

import pytest
import torch
from detectron2.layers import ROIAlign
from torch import Tensor

from mtl_rcnn.modeling.roi_align import ParallelROIAlign


@pytest.fixture(params=[1, 3])
def threads(request: pytest.FixtureRequest) -> int:
    before = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(before)


def boxes_of(images: list[int]) -> Tensor:
    """One overlapping, partly outside box per entry, on the image the entry names."""
    generator = torch.Generator().manual_seed(3)
    corner = torch.rand(len(images), 2, generator=generator) * 60 - 10
    size = torch.rand(len(images), 2, generator=generator) * 50 + 1
    return torch.cat([torch.tensor(images)[:, None].float(), corner, corner + size], dim=1)


def pooled_and_gradient(pooler: ROIAlign, features: Tensor, boxes: Tensor) -> tuple[Tensor, Tensor]:
    features = features.clone().requires_grad_()
    pooled = pooler(features, boxes)
    weights = torch.rand(pooled.shape, generator=torch.Generator().manual_seed(4), dtype=pooled.dtype)
    (pooled * weights).sum().backward()
    return pooled.detach(), features.grad


@pytest.mark.parametrize("images", [[0, 0, 1, 2, 2, 2], [2, 0, 2, 0], [1], []], ids=str)
@pytest.mark.parametrize("ratio", [0, 2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_equals_torchvision_bit_for_bit(images: list[int], ratio: int, dtype: torch.dtype, threads: int) -> None:
    features = torch.rand(3, 5, 17, 23, generator=torch.Generator().manual_seed(0), dtype=dtype)
    boxes = boxes_of(images)
    theirs = pooled_and_gradient(ROIAlign((7, 7), 0.25, ratio, True), features, boxes)
    ours = pooled_and_gradient(ParallelROIAlign((7, 7), 0.25, ratio, True), features, boxes)
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])
    assert torch.get_num_threads() == threads


def test_under_autocast_it_is_torchvisions_own() -> None:
    features = torch.rand(2, 4, 9, 9)
    boxes = boxes_of([0, 1])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        theirs = pooled_and_gradient(ROIAlign((3, 3), 0.25, 2, True), features.bfloat16(), boxes)
        ours = pooled_and_gradient(ParallelROIAlign((3, 3), 0.25, 2, True), features.bfloat16(), boxes)
    assert torch.equal(theirs[0], ours[0])
    assert torch.equal(theirs[1], ours[1])
