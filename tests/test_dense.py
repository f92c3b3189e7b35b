"""Decoders of tasks with a value per pixel, maps in the frame of an image, and the trunk that decodes by itself."""

from __future__ import annotations

import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from detectron2.modeling.postprocessing import sem_seg_postprocess
from omegaconf import DictConfig
from tiny import LABEL_SPACE, need_tasks
from torch import Tensor

from mtl_rcnn.config import compose
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.backbone import trunk_layers
from mtl_rcnn.modeling.dense import PlainDecoder, PyramidDecoder, build_decoder, enlarge, in_image_frame
from mtl_rcnn.modeling.refinenet import LightWeightRefineNet, ResidualPooling

PYRAMID = {f"p{level}": ShapeSpec(channels=12, stride=2**level) for level in range(2, 7)}
KNOBS = {"kind": "auto", "in_features": None, "conv_dim": 32, "norm": "GN", "common_stride": 4}


def features(height: int, width: int, images: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.randn(images, 12, height // shape.stride, width // shape.stride, generator=generator)
        for name, shape in PYRAMID.items()
    }


@pytest.mark.parametrize("norm", ["GN", "BN", ""])
def test_the_pyramid_decoder_equals_detectron2s_head_with_its_weights(norm: str) -> None:
    levels = {name: PYRAMID[name] for name in ("p2", "p3", "p4", "p5")}
    theirs = SemSegFPNHead(levels, num_classes=5, conv_dims=32, common_stride=4, norm=norm).eval()
    ours = build_decoder(5, PYRAMID, "decoder", **{**KNOBS, "norm": norm}).eval()
    assert isinstance(ours, PyramidDecoder)
    state = {(k if k.startswith("predictor") else f"scales.{k}"): v for k, v in theirs.state_dict().items()}
    ours.load_state_dict(state, strict=True)
    given = features(64, 96)
    with torch.no_grad():
        expected, _ = theirs(given)
        raw = ours(given)
        assert torch.equal(torch.jit.script(ours)(given), raw)
    assert raw.shape == (2, 5, 16, 24)
    for image in range(2):
        pixels = in_image_frame(raw[image], 4, torch.tensor([64, 96]), torch.tensor([71, 50]))
        assert torch.equal(pixels, sem_seg_postprocess(expected[image], (64, 96), 71, 50))


def test_nothing_of_the_padding_is_mixed_into_an_image() -> None:
    maps = torch.rand(3, 16, 24, generator=torch.Generator().manual_seed(1))
    for height, width in ((61, 93), (60, 92), (59, 89), (57, 85)):
        spoilt = torch.full_like(maps, float("nan"))
        rows, columns = -(-height // 4), -(-width // 4)
        spoilt[:, :rows, :columns] = maps[:, :rows, :columns]
        found = enlarge(spoilt, 4, height, width)
        assert found.shape == (3, height, width)
        assert torch.isfinite(found).all()
        size, image = torch.tensor([height, width]), torch.tensor([100, 33])
        assert torch.equal(in_image_frame(spoilt, 4, size, image), in_image_frame(maps, 4, size, image))


def test_cells_lie_where_their_pixels_are() -> None:
    ramp = (torch.arange(24.0) * 4 + 2).expand(1, 16, 24)  # the centre of a cell, in pixels
    found = enlarge(ramp, 4, 64, 90)
    torch.testing.assert_close(found[0, 0, 2:88], torch.arange(2, 88) + 0.5)
    doubled = in_image_frame(ramp, 4, torch.tensor([64, 96]), torch.tensor([128, 192]))
    torch.testing.assert_close(doubled[0, 0, 5:180], (torch.arange(5, 180) + 0.5) / 2)


def test_a_trunk_of_one_level_has_a_plain_head_unless_told_otherwise() -> None:
    one = {"p2": PYRAMID["p2"]}
    assert isinstance(build_decoder(3, one, "decoder", **KNOBS), PlainDecoder)
    assert isinstance(build_decoder(3, one, "decoder", **{**KNOBS, "kind": "pyramid"}), PyramidDecoder)
    plain = build_decoder(3, PYRAMID, "decoder", **{**KNOBS, "kind": "plain", "in_features": ["p4", "p3"]})
    assert plain.stride == 8
    assert plain(features(64, 96)).shape == (2, 3, 8, 12)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"kind": "fpn"}, r"decoder\.kind=fpn: expected auto, pyramid, plain"),
        ({"in_features": ["p9"]}, r"decoder\.in_features=\['p9'\]: expected some of .* p2 \(stride 4\)"),
        ({"conv_dim": 48}, r"decoder\.conv_dim=48: GN has 32 groups"),
        ({"in_features": ["p2"], "common_stride": 8}, r"decoder\.common_stride=8: a level of p2 is finer"),
    ],
)
def test_decoders_that_cannot_be_built(knobs: dict, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        build_decoder(3, PYRAMID, "decoder", **{**KNOBS, **knobs})


def refinenet(*overrides: str) -> DictConfig:
    tasks = "tasks=[semantic,depth]"
    return compose("train", [tasks, "model=mobilenetv2_lwrefinenet", "data.root=unused", *overrides])


def test_the_joint_network_of_the_paper_has_its_number_of_parameters() -> None:
    need_tasks("semantic", "depth")
    forty = LabelSpace((), {"sem_seg_classes": tuple({"name": f"class {index}"} for index in range(40))})
    model = build_model(refinenet(), forty)
    sizes = {name: sum(p.numel() for p in part.parameters()) for name, part in model.parts().items()}
    # 256 + 9 * 256 * C + C of each head; timm's MobileNet-v2 without its last layers has 1,811,712.
    assert sizes == {"trunk": 2_973_952, "semantic": 92_456, "depth": 2_561}
    assert sum(sizes.values()) == 3_068_969
    assert sum(sizes.values()) == pytest.approx(3.07e6, rel=0.01)


def test_the_small_trunk_runs_traced_and_scripted_on_any_size() -> None:
    need_tasks("semantic", "depth")
    model = build_model(refinenet("model.backbone.name=mobilenetv2_035", "model.backbone.channels=16"), LABEL_SPACE)
    assert model.roi_heads is None
    trunk = model.eval().backbone
    assert trunk.size_divisibility == 32
    images = [torch.rand(1, 3, height, width) for height, width in ((64, 96), (96, 32), (32, 32))]
    with torch.no_grad():
        exports = (torch.jit.script(trunk), torch.jit.trace(trunk, images[0], strict=False))
        for image in images:
            expected = trunk(image)["p2"]
            assert expected.shape == (1, 16, image.shape[2] // 4, image.shape[3] // 4)
            for export in exports:
                torch.testing.assert_close(export(image)["p2"], expected)


def test_every_layer_of_the_small_trunk_belongs_to_one_part_and_learns() -> None:
    trunk = small_trunk()
    layers = trunk_layers(trunk)
    counted = [id(p) for layer in layers for p in layer.parameters()]
    assert sorted(counted) == sorted({id(p) for p in trunk.parameters()})
    assert len(layers) > 5
    trunk(torch.rand(2, 3, 64, 64))["p2"].square().mean().backward()
    assert all(p.grad is not None for p in trunk.parameters())
    frozen = small_trunk(frozen=True).train()
    assert not any(p.requires_grad for p in frozen.bottom_up.parameters())
    assert not frozen.bottom_up.body.training


def small_trunk(frozen: bool = False) -> LightWeightRefineNet:
    return LightWeightRefineNet(name="mobilenetv2_035", options={}, frozen=frozen, channels=16, stages=2)


def test_residual_pooling_by_hand() -> None:
    chain = ResidualPooling(1, 2, grouped=True)
    for stage, weight in zip(chain.stages, (2.0, -3.0), strict=True):
        torch.nn.init.constant_(stage.weight, weight)
    x = torch.zeros(1, 1, 7, 7)
    x[0, 0, 3, 3] = 1
    found = chain(x)[0, 0]
    # 2 * max within 2 pixels; then -3 * the maximum of that within 2 pixels, so within 4: everywhere.
    assert found[3, 3] == 1 + 2 - 6
    assert found[1, 5] == 0 + 2 - 6
    assert found[0, 0] == 0 + 0 - 6


def test_boxes_on_a_trunk_of_one_level_are_refused() -> None:
    cfg = compose("train", ["tasks=[detection]", "model=mobilenetv2_lwrefinenet", "data.root=unused"])
    said = r"tasks\.detection\.in_features=.*: the trunk has no level p3, p4, p5, it has p2; .* model=resnet50_fpn"
    with pytest.raises(ConfigError, match=said):
        build_model(cfg, LABEL_SPACE)


def test_another_encoder_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"model\.backbone\.name=resnet10t: .* model=timm_fpn"):
        LightWeightRefineNet(name="resnet10t", options={}, frozen=False, channels=16, stages=2)
