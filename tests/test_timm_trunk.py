"""Trunks from timm: features as timm itself gives them, weights of its files, and a network that trains on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from omegaconf import DictConfig
from tiny import LABEL_SPACE, TASKS, available_tasks, make_sample, tiny_config

from mtl_rcnn.config import compose
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.lr_factors import lr_factors
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.modeling.backbone import ResNetFPN
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

PYRAMIDS = {
    "resnet10t": {},
    "convnext_atto": {},
    "mobilenetv3_small_050": {},
    "swin_tiny_patch4_window7_224": {"strict_img_size": False, "depths": [1, 1, 1, 1], "embed_dim": 24},
}
VIT = {"depth": 2, "embed_dim": 48, "num_heads": 3}


def timm_config(model: str, name: str, options: dict[str, Any], *overrides: str) -> DictConfig:
    given = [f"+model.backbone.options.{key}={value}".replace(" ", "") for key, value in options.items()]
    tasks = available_tasks()
    knobs = [knob for task in tasks for knob in TASKS.get(task, [])]
    return compose(
        "train",
        [
            *(f"tasks=[{','.join(tasks)}]", f"model={model}", f"model.backbone.name={name}", "data.root=unused"),
            *(*given, "model.backbone.fpn_channels=16", *knobs, *overrides),
        ],
    )


def timm_model(model: str, name: str, options: dict[str, Any], *overrides: str) -> MultiTaskRCNN:
    return build_model(timm_config(model, name, options, *overrides), LABEL_SPACE)


@pytest.mark.parametrize("name", PYRAMIDS)
def test_features_are_those_timm_gives(name: str) -> None:
    network = timm_model("timm_fpn", name, PYRAMIDS[name]).eval()
    reference = timm.create_model(name, features_only=True, **PYRAMIDS[name]).eval()
    whole = timm.create_model(name, **PYRAMIDS[name])
    _share_weights(whole, network, reference)
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = reference(image)[-4:]
        found = network.backbone.bottom_up(image)
    for level, theirs in zip(("res2", "res3", "res4", "res5"), expected, strict=True):
        if found[level].shape != theirs.shape:
            theirs = theirs.permute(0, 3, 1, 2)  # Swin's channels come last
        torch.testing.assert_close(found[level], theirs)


def _share_weights(whole: torch.nn.Module, network: MultiTaskRCNN, reference: torch.nn.Module) -> None:
    """One set of weights: under timm's own names in the network, by timm's own conversion in its feature extractor."""
    state = whole.state_dict()
    body = network.backbone.bottom_up.body
    body.load_state_dict({key: state[key] for key in body.state_dict()})
    flat = {key.replace(".", "_", 1): value for key, value in state.items()}
    own = reference.state_dict()
    reference.load_state_dict({key: (state if key in state else flat)[key] for key in own})


@pytest.mark.parametrize(
    ("model", "name", "options"),
    [("timm_fpn", "convnext_atto", {}), ("vit_pyramid", "vit_tiny_patch16_224", VIT)],
)
def test_a_network_on_it_trains_and_predicts(model: str, name: str, options: dict[str, Any]) -> None:
    network = timm_model(model, name, options)
    batch = [make_sample(0, (96, 128), 4), make_sample(1, (128, 80), 3)]
    losses, _ = network.train()(batch)
    sum(total / count.clamp(min=1) for total, count in losses.values()).backward()
    without = [key for key, value in network.backbone.named_parameters() if value.requires_grad and value.grad is None]
    assert not without
    shapes = {key: value.shape[-2:] for key, value in network.backbone(torch.zeros(1, 3, 128, 160)).items()}
    assert shapes == {"p2": (32, 40), "p3": (16, 20), "p4": (8, 10), "p5": (4, 5), "p6": (2, 3)}
    predictions = network.eval()(batch)
    assert [set(prediction) >= {"boxes", "scores", "classes"} for prediction in predictions] == [True, True]


def test_a_frozen_trunk_learns_nothing_and_keeps_its_statistics() -> None:
    network = timm_model("timm_fpn", "mobilenetv3_small_050", {}, "model.backbone.frozen=true").train()
    before = {key: value.clone() for key, value in network.backbone.bottom_up.state_dict().items()}
    losses, _ = network([make_sample(0, (96, 128), 4)])
    sum(total / count.clamp(min=1) for total, count in losses.values()).backward()
    assert all(value.grad is None for value in network.backbone.bottom_up.parameters())
    assert network.backbone.fpn_lateral2.weight.grad.abs().sum() > 0
    assert all(torch.equal(value, before[key]) for key, value in network.backbone.bottom_up.state_dict().items())


def test_layers_from_the_image_upwards_hold_every_parameter() -> None:
    for model, name, options in (("timm_fpn", "convnext_atto", {}), ("vit_pyramid", "vit_tiny_patch16_224", VIT)):
        network = timm_model(model, name, options)
        factors = lr_factors(network, {"lr_factors": {}, "layer_decay": 0.5})
        assert {id(parameter) for parameter in network.backbone.parameters()} == set(factors)
        first = next(network.backbone.bottom_up.body.parameters())
        assert factors[id(first)] == min(factors.values())


@pytest.mark.parametrize("source", ["file", "timm"])
def test_weights_of_timm_are_taken_with_their_pixels(
    tmp_path: Path, source: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = timm.create_model("vit_tiny_patch16_224", **VIT)
    path = tmp_path / "vit.pth"
    torch.save(whole.state_dict(), path)
    weights = str(path) if source == "file" else "timm://vit_tiny_patch16_224"
    create = timm.create_model

    def from_file(name: str, pretrained: bool = False, **more: Any) -> torch.nn.Module:
        """Stands for the download alone."""
        overlay = {"pretrained_cfg_overlay": {"file": str(path)}, **VIT} if pretrained else {}
        return create(name, pretrained=pretrained, **more, **overlay)

    monkeypatch.setattr(timm, "create_model", from_file)
    cfg = timm_config("vit_pyramid", "vit_tiny_patch16_224", VIT, f"checkpoint.weights={weights}")
    network = build_model(cfg, LABEL_SPACE)
    load_initial_weights(cfg, network, LABEL_SPACE)
    found = network.backbone.bottom_up.body.state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in found.items())
    cfg.model.pixel_mean = [1.0, 2.0, 3.0]
    if source == "timm":
        with pytest.raises(ConfigError, match=r"model\.pixel_mean=\[127\.5,127\.5,127\.5\]"):
            load_initial_weights(cfg, network, LABEL_SPACE)


def test_batch_norms_of_another_epsilon_are_taken_as_they_are(tmp_path: Path) -> None:
    """TensorFlow's networks add 1e-3 to variances, here and in timm alike."""
    name = "tf_mobilenetv3_small_minimal_100"
    whole = timm.create_model(name)
    torch.save(whole.state_dict(), tmp_path / "tf.pth")
    cfg = timm_config("timm_fpn", name, {}, f"checkpoint.weights={tmp_path / 'tf.pth'}")
    network = build_model(cfg, LABEL_SPACE)
    load_initial_weights(cfg, network, LABEL_SPACE)
    found = network.backbone.bottom_up.body.state_dict()
    assert all(torch.equal(value, whole.state_dict()[key]) for key, value in found.items())


def test_what_cannot_be_built_or_had_is_one_clear_error() -> None:
    with pytest.raises(ConfigError, match=r"no such model; did you mean .*convnext_tiny"):
        timm_model("timm_fpn", "convnet_tiny", {})
    with pytest.raises(ConfigError, match=r"strides 16 and lacks 4, 8, 32.*model=vit_pyramid"):
        timm_model("timm_fpn", "vit_tiny_patch16_224", VIT)
    with pytest.raises(ConfigError, match=r"model\.backbone\.options=.*colour"):
        timm_model("timm_fpn", "convnext_atto", {"colour": "red"})
    cfg = timm_config("timm_fpn", "convnext_atto", {}, "checkpoint.weights=timm://convnext_atto.nowhere")
    with pytest.raises(CheckpointError, match="timm cannot give these weights"):
        load_initial_weights(cfg, build_model(cfg, LABEL_SPACE), LABEL_SPACE)


def test_a_checkpoint_that_names_no_trunk_has_the_resnet() -> None:
    """As the first release wrote them."""
    cfg = tiny_config(("detection",))
    del cfg.model.backbone._target_
    assert isinstance(build_model(cfg, LABEL_SPACE).backbone, ResNetFPN)
