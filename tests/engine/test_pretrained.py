"""Weights of Detectron2, Caffe2 and torchvision: files made by those libraries, results compared with theirs."""

from __future__ import annotations

import os
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision
from detectron2.modeling.postprocessing import detector_postprocess
from omegaconf import DictConfig, OmegaConf
from reference import copy_weights, detectron2_rcnn, randomise_statistics
from safetensors.torch import save_file
from tiny import LABEL_SPACE, make_sample, tiny_config, tiny_model
from torch import Tensor, nn
from torchvision.models.detection import keypoint_rcnn, mask_rcnn
from toy import Toy

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.pretrained.class_layers import match_classes
from mtl_rcnn.engine.pretrained.convert import import_weights
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.engine.pretrained.names import rename
from mtl_rcnn.engine.pretrained.norms import fit_norms
from mtl_rcnn.engine.pretrained.safe_pickle import load_pickle
from mtl_rcnn.engine.pretrained.weight_file import read_weight_file
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

TASKS = ("detection", "mask", "keypoint")
LIKE_DETECTRON2 = [
    "model.backbone.width=64",
    "model.pixel_std=[1.0,1.0,1.0]",
    "+tasks.keypoint.shared_schemas.disc=figure",
]


def config(tasks: tuple[str, ...], weights: Path | str, *overrides: str) -> DictConfig:
    return tiny_config(tasks, f"checkpoint.weights={weights}", *overrides)


def imported(cfg: DictConfig, label_space: LabelSpace = LABEL_SPACE) -> MultiTaskRCNN:
    model = build_model(cfg, label_space)
    load_initial_weights(cfg, model, label_space)
    return model.eval()


def stock(seed: int) -> nn.Module:
    """Detectron2's network with visible random weights."""
    ours = tiny_model(TASKS, *LIKE_DETECTRON2)
    randomise_statistics(ours, seed)
    theirs = detectron2_rcnn(2, 3)
    copy_weights(ours, theirs)
    return theirs.eval()


def write_zoo_pickle(path: Path, model: nn.Module, protocol: int, **more: Any) -> None:
    """As Detectron2's model zoo publishes its networks."""
    arrays = {name: value.numpy() for name, value in model.state_dict().items()}
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "Detectron2 Model Zoo", **more}, protocol))


@pytest.mark.parametrize("kind", ["pkl2", "pkl5", "pth", "bare", "wrapped", "safetensors"])
def test_a_detectron2_file_predicts_what_detectron2_predicts(tmp_path: Path, kind: str) -> None:
    theirs = stock(seed=1)
    path = tmp_path / f"model.{kind if kind == 'safetensors' else kind[:3] if kind.startswith('pkl') else 'pth'}"
    if kind.startswith("pkl"):
        write_zoo_pickle(path, theirs, int(kind[3:]))
    elif kind == "safetensors":
        save_file({name: value.contiguous() for name, value in theirs.state_dict().items()}, path)
    else:
        state = theirs.state_dict()
        wrapped = {f"module.{name}": value for name, value in state.items()}
        torch.save({"pth": {"model": state, "iteration": 7}, "bare": state, "wrapped": wrapped}[kind], path)
    ours = imported(config(TASKS, path, *LIKE_DETECTRON2, "seed=5"))
    batch = [make_sample(0, (96, 128), 4), make_sample(1, (128, 80), 3)]
    with torch.no_grad():
        expected, found = [entry["instances"] for entry in theirs(batch)], ours(batch)
    assert sum(len(entry) for entry in expected) > 20
    for mine, reference in zip(found, expected, strict=True):
        assert torch.equal(mine["boxes"], reference.pred_boxes.tensor)
        assert torch.equal(mine["classes"], reference.pred_classes)
        assert torch.equal(mine["masks"], reference.pred_masks)
        assert torch.equal(mine["keypoints"], reference.pred_keypoints)


def test_names_without_beginnings_are_completed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Detectron2's converted ImageNet backbones: only the bottom-up trunk, the rest starts at random."""
    theirs = stock(seed=2)
    start = "backbone.bottom_up."
    arrays = {n.removeprefix(start): v.numpy() for n, v in theirs.state_dict().items() if n.startswith(start)}
    arrays["stem.fc.weight"] = np.zeros((10, 8), np.float32)
    path = tmp_path / "r18.pkl"
    path.write_bytes(pickle.dumps({"model": arrays, "__author__": "torchvision", "matching_heuristics": True}, 2))
    with pytest.raises(ConfigError, match=r"model\.input_format=RGB"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))
    with caplog.at_level("INFO", "mtl_rcnn"):
        ours = imported(config(TASKS, path, *TORCHVISION))
    for name, value in theirs.backbone.bottom_up.state_dict().items():
        assert torch.equal(ours.backbone.bottom_up.state_dict()[name], value), name
    assert "not used: stem.fc.weight" in caplog.text
    random = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert [text.split(":")[0] for text in random] == ["backbone (pyramid)", *TASKS[:1], *sorted(TASKS[1:])]


CAFFE2 = {
    "conv1_w": (64, 3, 7, 7),
    "res_conv1_bn_s": (64,),
    "res_conv1_bn_b": (64,),
    "res2_0_branch1_w": (256, 64, 1, 1),
}


def test_a_caffe2_backbone_gives_equal_features(tmp_path: Path) -> None:
    """MSRA's ResNet-50: Caffe2 names, batch norms folded to scale and shift, BGR, strides in the 1x1 convolutions."""
    tasks = ("detection",)
    like_msra = [
        *("model=resnet50_fpn", "model.backbone.width=64", "model.backbone.fpn_channels=16"),
        "model.backbone.freeze_at=0",
    ]
    source = tiny_model(tasks, *like_msra, "seed=3")
    for name, value in source.backbone.bottom_up.state_dict().items():
        if name.endswith(("norm.weight", "norm.bias")):
            value.copy_(torch.rand(value.shape, generator=torch.Generator().manual_seed(len(name))) + 0.5)
    blobs = {}
    for name, value in source.backbone.bottom_up.state_dict().items():
        if "running" not in name:
            blobs[caffe2_name(name)] = value.numpy()
    blobs |= {"pred_w": np.zeros((10, 4), np.float32), "conv1_w_momentum": np.zeros(3, np.float32)}
    assert CAFFE2.items() <= {name: array.shape for name, array in blobs.items()}.items()
    path = tmp_path / "R-50.pkl"
    path.write_bytes(pickle.dumps(blobs, 2))
    ours = imported(config(tasks, path, *like_msra, "seed=4"))
    image = torch.randn(1, 3, 64, 96, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected, found = source.eval().backbone.bottom_up(image), ours.backbone.bottom_up(image)
    for level in expected:
        torch.testing.assert_close(found[level], expected[level], rtol=1e-5, atol=1e-5)
    with pytest.raises(ConfigError, match=r"model\.input_format=BGR"):
        imported(config(tasks, path, *like_msra, "model.input_format=RGB"))


def caffe2_name(name: str) -> str:
    """The blob of one of our ResNet-50's tensors in Caffe2's Detectron."""
    leaf = {"weight": "w", "bias": "b"}[name.rsplit(".", 1)[1]]
    if ".norm." in name:
        leaf = {"w": "bn_s", "b": "bn_b"}[leaf]
    words = name.split(".")
    if words[0] == "stem":
        return "conv1_w" if leaf == "w" else f"res_conv1_{leaf}"
    branch = {"shortcut": "branch1", "conv1": "branch2a", "conv2": "branch2b", "conv3": "branch2c"}[words[2]]
    return f"{words[0]}_{words[1]}_{branch}_{leaf}"


TORCHVISION = [
    *("model.backbone.width=64", "model.input_format=RGB", "model.pixel_mean=[123.675,116.28,103.53]"),
    "model.pixel_std=[58.395,57.12,57.375]",
]


def torchvision_network(kind: type[nn.Module], **more: Any) -> nn.Module:
    """A torchvision detector on a narrow ResNet-18 pyramid, with visible random weights."""
    torch.manual_seed(0)
    backbone = torchvision.models.detection.backbone_utils.resnet_fpn_backbone(
        backbone_name="resnet18", weights=None, trainable_layers=5, norm_layer=nn.BatchNorm2d
    )
    network = kind(backbone, **more)
    for name, value in network.state_dict().items():
        if name.endswith("running_mean"):
            value.normal_(0, 0.1)
        elif name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    return network.eval()


WIDE = [
    *("model.backbone.fpn_channels=256", "tasks.detection.fc_dims=[1024,1024]"),
    "tasks.detection.rpn.anchor_sizes=[[32],[64],[128],[256],[512]]",
]


def test_a_torchvision_mask_rcnn_gives_equal_outputs_per_module(tmp_path: Path) -> None:
    tasks = ("detection", "mask")
    theirs = torchvision_network(mask_rcnn.MaskRCNN, num_classes=3)
    path = tmp_path / "maskrcnn.pth"
    torch.save({"model": theirs.state_dict(), "epoch": 3}, path)
    widths = [*TORCHVISION, *WIDE, "tasks.mask.conv_dims=[256,256,256,256,256]"]
    ours = imported(config(tasks, path, *widths))
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 64, 96, generator=generator)
    pooled, small = torch.randn(5, 256, 7, 7, generator=generator), torch.randn(2, 256, 14, 14, generator=generator)
    with torch.no_grad():
        features, reference = ours.backbone(image), theirs.backbone(image)
        for mine, other in zip(["p2", "p3", "p4", "p5", "p6"], ["0", "1", "2", "3", "pool"], strict=True):
            torch.testing.assert_close(features[mine], reference[other], rtol=1e-5, atol=1e-5)
        detector, heads = ours.roi_heads.detector, theirs.roi_heads
        logits, deltas = detector.rpn.rpn_head([features["p3"]])
        their_logits, their_deltas = theirs.rpn.head([reference["1"]])
        torch.testing.assert_close(logits[0], their_logits[0], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(deltas[0], their_deltas[0], rtol=1e-5, atol=1e-5)
        scores, boxes = detector.box_predictor(detector.box_head(pooled))
        their_scores, their_boxes = heads.box_predictor(heads.box_head(pooled))
        torch.testing.assert_close(scores, their_scores[:, [1, 2, 0]], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(boxes, their_boxes[:, 4:], rtol=1e-5, atol=1e-5)
        masks = ours.roi_heads.tasks["mask"](small)
        torch.testing.assert_close(masks, heads.mask_predictor(heads.mask_head(small))[:, 1:], rtol=1e-5, atol=1e-5)


def test_a_torchvision_keypoint_rcnn_is_grafted_beside_a_mask_head(tmp_path: Path) -> None:
    mask = torchvision_network(mask_rcnn.MaskRCNN, num_classes=3)
    keypoint = torchvision_network(keypoint_rcnn.KeypointRCNN, num_classes=2, num_keypoints=3)
    paths = [tmp_path / "mask.pth", tmp_path / "keypoint.pth"]
    for path, network in zip(paths, (mask, keypoint)):
        torch.save(network.state_dict(), path)
    wide = ["tasks.mask.conv_dims=[256,256,256,256,256]", f"tasks.keypoint.conv_dims={[512] * 8}"]
    cfg = config(TASKS, paths[0], *TORCHVISION, *WIDE, *wide, f"+checkpoint.graft.keypoint={paths[1]}")
    ours = imported(cfg)
    pooled = torch.randn(2, 256, 14, 14, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        heads = keypoint.roi_heads
        expected = heads.keypoint_predictor(heads.keypoint_head(pooled))
        torch.testing.assert_close(ours.roi_heads.tasks["keypoint"](pooled), expected, rtol=1e-5, atol=1e-5)
        heads = mask.roi_heads
        expected = heads.mask_predictor(heads.mask_head(pooled))[:, 1:]
        torch.testing.assert_close(ours.roi_heads.tasks["mask"](pooled), expected, rtol=1e-5, atol=1e-5)


def test_a_graft_gives_one_files_masks_and_anothers_keypoints(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    first, second = stock(seed=1), stock(seed=2)
    second.backbone.load_state_dict(first.backbone.state_dict())  # as after training a head on a frozen trunk
    with torch.no_grad():
        second.roi_heads.keypoint_head.score_lowres.weight.neg_()
    for name, network in (("first", first), ("second", second)):
        write_zoo_pickle(tmp_path / f"{name}.pkl", network, 2)
    graft = f"+checkpoint.graft.keypoint={tmp_path / 'second.pkl'}"
    with caplog.at_level("INFO", "mtl_rcnn"):
        grafted = imported(config(TASKS, tmp_path / "first.pkl", *LIKE_DETECTRON2, graft))
    assert "keypoint from" in caplog.text
    assert "its trunk differs" not in caplog.text
    batch = [make_sample(0, (96, 128), 4)]
    with torch.no_grad():
        expected = first(batch)[0]["instances"]
        (found,) = grafted(batch)
        features = second.backbone(second.preprocess_image(batch).tensor)
        boxes = first.inference(batch, do_postprocess=False)
        (given,) = second.roi_heads.forward_with_given_boxes(features, boxes)
    given = detector_postprocess(given, batch[0]["height"], batch[0]["width"])
    assert len(expected) > 20
    assert torch.equal(found["boxes"], expected.pred_boxes.tensor)
    assert torch.equal(found["masks"], expected.pred_masks)
    assert torch.equal(found["keypoints"], given.pred_keypoints)
    assert not torch.equal(found["keypoints"], expected.pred_keypoints)


def test_a_graft_from_another_trunk_is_said_to_need_training(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for seed in (1, 2):
        write_zoo_pickle(tmp_path / f"{seed}.pkl", stock(seed), 2)
    overrides = [*LIKE_DETECTRON2, f"+checkpoint.graft.mask={tmp_path / '2.pkl'}"]
    with caplog.at_level("INFO", "mtl_rcnn"):
        imported(config(TASKS, tmp_path / "1.pkl", *overrides))
    assert "its trunk differs from that of" in caplog.text
    with pytest.raises(ConfigError, match=r"checkpoint\.graft\.maks: no such task"):
        imported(config(TASKS, tmp_path / "1.pkl", *LIKE_DETECTRON2, "+checkpoint.graft.maks=x.pkl"))


def test_a_torchvision_resnet_gives_equal_features_whatever_its_epsilon(tmp_path: Path) -> None:
    theirs = torchvision.models.resnet18(weights=None).eval()
    for name, value in theirs.state_dict().items():
        if name.endswith("running_var"):
            value.uniform_(0.5, 1.5)
    for module in theirs.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = 0.1
    path = tmp_path / "resnet18.pth"
    torch.save(theirs.state_dict(), path)
    tasks = ("detection",)
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        stem = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(image))))
        expected = theirs.layer2(theirs.layer1(stem))
        fitting = imported(config(tasks, path, *TORCHVISION, "checkpoint.source_eps=0.1")).backbone.bottom_up(image)
        other = imported(config(tasks, path, *TORCHVISION)).backbone.bottom_up(image)
    torch.testing.assert_close(fitting["res3"], expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(other["res3"], expected, rtol=1e-2, atol=1e-2)


def test_coco_classes_are_chosen_by_name() -> None:
    assert match_classes(80, ["person", "dog"]).rows == (0, 16)
    assert match_classes(90, ["person", "dog", "toothbrush"]).rows == (0, 17, 89)
    assert match_classes(2, ["left", "right"]).rows == (0, 1)
    assert match_classes(80, ["left", "right"]).rows is None


def test_another_class_count_is_an_error_that_names_the_way_out(tmp_path: Path) -> None:
    write_zoo_pickle(tmp_path / "model.pkl", stock(seed=1), 2)
    one = LabelSpace(LABEL_SPACE.categories[:1])
    overrides = LIKE_DETECTRON2[:2]
    with pytest.raises(CheckpointError, match=r"(?s)shape differs: .*cls_score.*checkpoint\.reinit=") as error:
        imported(config(TASKS, tmp_path / "model.pkl", *overrides), one)
    assert "roi_heads.detector.box_predictor.bbox_pred.*" in str(error.value)
    cfg = config(TASKS, tmp_path / "model.pkl", *overrides)
    OmegaConf.update(
        cfg, "checkpoint.reinit", ["roi_heads.detector.box_predictor.*", "roi_heads.tasks.mask.head.predictor.*"]
    )
    imported(cfg, one)


def test_classes_of_torchvision_are_never_one_place_off(tmp_path: Path) -> None:
    """Its box and mask layers have rows for the background: with a class less than the run has, their shapes fit."""
    torch.save(torchvision_network(mask_rcnn.MaskRCNN, num_classes=2).state_dict(), tmp_path / "one.pth")
    widths = [*TORCHVISION, *WIDE, "tasks.mask.conv_dims=[256,256,256,256,256]"]
    cfg = config(("detection", "mask"), tmp_path / "one.pth", *widths)
    cfg.checkpoint.reinit = ["roi_heads.detector.box_predictor.cls_score.*"]
    with pytest.raises(CheckpointError, match=r"missing in the file: .*bbox_pred"):
        imported(cfg)


def test_a_trunk_that_is_not_fully_matched_is_an_error(tmp_path: Path) -> None:
    state: Mapping[str, Tensor] = stock(seed=1).state_dict()
    path = tmp_path / "model.pth"
    torch.save({name: value for name, value in state.items() if "res4.1.conv2" not in name}, path)
    with pytest.raises(CheckpointError, match=r"missing in the file: backbone\.bottom_up\.res4\.1\.conv2\.weight"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))
    torch.save({name: value for name, value in state.items() if "bottom_up" not in name}, path)
    with pytest.raises(CheckpointError, match="no weights of the trunk"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))


def test_pixels_follow_the_file(tmp_path: Path) -> None:
    path = tmp_path / "resnet18.pth"
    torch.save(torchvision.models.resnet18(weights=None).state_dict(), path)
    with pytest.raises(ConfigError) as error:
        imported(config(("detection",), path, "model.backbone.width=64"))
    advised = str(error.value).split("; add ")[1].split()
    assert "model.input_format=RGB" in advised
    imported(config(("detection",), path, "model.backbone.width=64", *advised))
    state = stock(seed=1).state_dict() | {"pixel_mean": torch.ones(3, 1, 1), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": state}, path)
    with pytest.raises(ConfigError, match=r"model\.pixel_mean=\[1,1,1\]"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))


class Evil:
    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.mark),)


@pytest.mark.parametrize("suffix", ["pkl", "pth"])
def test_a_strangers_file_runs_no_code(tmp_path: Path, suffix: str) -> None:
    content = {"model": {"weight": Evil(tmp_path / "was_run")}, "__author__": "somebody"}
    path = tmp_path / f"model.{suffix}"
    path.write_bytes(pickle.dumps(content)) if suffix == "pkl" else torch.save(content, path)
    with pytest.raises(CheckpointError, match=r"refused.*mkdir"):
        read_weight_file(str(path))
    assert not (tmp_path / "was_run").exists()


@pytest.mark.parametrize("protocol", range(6))
def test_arrays_of_any_pickle_protocol_are_read(tmp_path: Path, protocol: int) -> None:
    content = {"a": np.arange(6, dtype=np.float32).reshape(2, 3).T, "b": np.float64(2.5), "c": [b"bytes", "text", None]}
    path = tmp_path / "arrays.pkl"
    path.write_bytes(pickle.dumps(content, protocol))
    found = load_pickle(path)
    assert np.array_equal(found["a"], content["a"])
    assert found["b"] == 2.5
    assert list(found["c"]) == [b"bytes", "text", None]


@pytest.mark.parametrize("name", ["model.pkl", "model.pth", "model.safetensors"])
@pytest.mark.parametrize("content", [b"", b"no weights", "half"])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, name: str, content: bytes | str) -> None:
    path = tmp_path / name
    if content == "half":
        tensors = {"layer1.0.conv1.weight": torch.zeros(100, 100)}
        if name.endswith("pkl"):
            path.write_bytes(pickle.dumps({k: v.numpy() for k, v in tensors.items()}))
        elif name.endswith("pth"):
            torch.save(tensors, path)
        else:
            save_file(tensors, path)
        content = path.read_bytes()[: path.stat().st_size // 2]
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.\w+.*(not a readable|truncated)"):
        read_weight_file(str(path))


def test_files_without_weights_are_named(tmp_path: Path) -> None:
    for content, said in (([1, 2], "holds a list"), ({"epoch": 3}, "no tensors by name")):
        torch.save(content, tmp_path / "model.pth")
        with pytest.raises(CheckpointError, match=said):
            read_weight_file(str(tmp_path / "model.pth"))
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"no known layout \(encoder\.weight"):
        imported(config(("detection",), tmp_path / "model.pth"))
    with pytest.raises(CheckpointError, match="a directory"):
        read_weight_file(str(tmp_path))
    with pytest.raises(CheckpointError, match="no such file"):
        read_weight_file(str(tmp_path / "other.pth"))
    with pytest.raises(CheckpointError, match="torchvision has no such weights"):
        read_weight_file("torchvision://ResNet18_Weights.NONE")


def test_imported_weights_can_be_evaluated_untrained(toy: Toy, tmp_path: Path) -> None:
    theirs = detectron2_rcnn(3, 3)
    write_zoo_pickle(tmp_path / "model.pkl", theirs, 2)
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    overrides = [*LIKE_DETECTRON2[:2], f"data.train=[{data}]", f"output_dir={tmp_path / 'run'}"]
    cfg = config(TASKS, tmp_path / "model.pkl", *overrides)
    path = import_weights(cfg, Ranks(0, 1, 0, torch.device("cpu")))
    restored = restore(path)
    expected = theirs.roi_heads.box_predictor.bbox_pred.weight
    assert torch.equal(restored.model.roi_heads.detector.box_predictor.bbox_pred.weight, expected)
    assert restored.label_space.classes == ("figure", "disc", "square")
    cfg.checkpoint.weights = None
    with pytest.raises(ConfigError, match=r"checkpoint\.weights: name the file"):
        import_weights(cfg, Ranks(0, 1, 0, torch.device("cpu")))


class Pointers:
    """A dtype that claims to hold objects: NumPy would take the array's bytes for their addresses."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("V8",), (3, "|", None, ("a",), {"a": (np.dtype("O"), 0)}, 8, 8, 1)


class Flagged:
    """A plain dtype whose state sets the flag of objects."""

    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("f4", False, True), (3, "<", None, None, None, -1, -1, 1)


class Strings:
    def __reduce__(self) -> tuple[Any, ...]:
        return np.dtype, ("O",)


@pytest.mark.parametrize("dtype", [Pointers(), Flagged(), Strings()])
def test_a_dtype_that_numpy_would_trust_is_refused(tmp_path: Path, dtype: Any) -> None:
    class Array:
        def __reduce__(self) -> tuple[Any, ...]:
            rebuild, arguments, _ = np.zeros(1).__reduce__()
            return rebuild, arguments, (1, (1,), dtype, False, b"A" * 8)

    path = tmp_path / "evil.pkl"
    path.write_bytes(pickle.dumps({"weight": Array()}))
    with pytest.raises(CheckpointError, match=r"refused.*dtype"):
        load_pickle(path)


def test_epsilon_zero_keeps_channels_without_variance_finite() -> None:
    """As in torchvision's official detectors, whose batch norms add nothing to the variance."""
    theirs = torchvision.ops.FrozenBatchNorm2d(3, eps=0.0)
    theirs.load_state_dict(
        {
            "weight": torch.tensor([1e-20, 0.5, 2.0]),
            "bias": torch.tensor([0.1, 0.2, 0.3]),
            "running_mean": torch.tensor([0.0, 1.0, -1.0]),
            "running_var": torch.tensor([1e-40, 1e-5, 4.0]),
        }
    )
    ours = nn.Sequential(nn.BatchNorm2d(3)).eval()
    ours.load_state_dict(fit_norms({f"0.{name}": value for name, value in theirs.state_dict().items()}, ours, 0.0))
    image = torch.randn(1, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    image[:, 0] = 0  # a dead channel: its input is its mean
    found, expected = ours(image), theirs(image)
    assert found.isfinite().all()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "eps"), [("maskrcnn_resnet50_fpn_coco-bf2d0c1e.pth", 0.0), ("r50_fpn_coco-mine.pth", 1e-5)]
)
def test_official_coco_files_have_epsilon_zero(tmp_path: Path, name: str, eps: float) -> None:
    torch.save(torchvision_network(mask_rcnn.MaskRCNN, num_classes=3).state_dict(), tmp_path / name)
    widths = [*TORCHVISION, *WIDE, "tasks.mask.conv_dims=[256,256,256,256,256]"]
    model = tiny_model(("detection", "mask"), *widths)
    assert rename(read_weight_file(str(tmp_path / name)), model).eps == eps


def test_names_of_classes_are_checked_whatever_else_starts_anew(toy: Toy, tmp_path: Path) -> None:
    write_zoo_pickle(tmp_path / "model.pkl", detectron2_rcnn(3, 3), 2)
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    overrides = [*LIKE_DETECTRON2[:2], f"data.train=[{data}]", f"output_dir={tmp_path / 'run'}"]
    path = import_weights(config(TASKS, tmp_path / "model.pkl", *overrides), Ranks(0, 1, 0, torch.device("cpu")))
    space = restore(path).label_space
    turned = LabelSpace((space.categories[1], space.categories[0], space.categories[2]))
    cfg = config(TASKS, path, *LIKE_DETECTRON2[:2], "checkpoint.reinit=[roi_heads.tasks.keypoint.*]")
    with pytest.raises(CheckpointError, match="another order"):
        imported(cfg, turned)
    imported(cfg, space)
    cfg.model.pixel_mean = [1.0, 2.0, 3.0]
    with pytest.raises(ConfigError, match=r"model\.pixel_mean=\[103\.53,116\.28,123\.675\]"):
        imported(cfg, space)
    cfg.checkpoint.check_pixels = False
    imported(cfg, space)


def test_statistics_are_not_invented(tmp_path: Path) -> None:
    state = {name: value for name, value in stock(seed=1).state_dict().items() if "running_" not in name}
    torch.save(state, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"missing in the file: .*running_mean"):
        imported(config(TASKS, tmp_path / "model.pth", *LIKE_DETECTRON2))


def test_a_network_with_further_layers_is_another_network(tmp_path: Path) -> None:
    state = torchvision.models.resnet18(weights=None).state_dict() | {"layer1.0.se.fc1.weight": torch.zeros(2, 2)}
    torch.save(state, tmp_path / "seresnet18.pth")
    with pytest.raises(CheckpointError, match=r"no place for \(layer1\.0\.se\.fc1\.weight"):
        imported(config(("detection",), tmp_path / "seresnet18.pth", *TORCHVISION))


def test_the_zoos_own_files_expect_their_pixels(tmp_path: Path) -> None:
    write_zoo_pickle(tmp_path / "model.pkl", stock(seed=1), 2)
    with pytest.raises(ConfigError, match=r"model\.pixel_std=\[1,1,1\]"):
        imported(config(TASKS, tmp_path / "model.pkl", *TORCHVISION, LIKE_DETECTRON2[-1]))
    state = stock(seed=1).state_dict() | {"pixel_mean": torch.full((3, 1, 1), 127.5), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": state}, tmp_path / "grey.pth")
    imported(config(TASKS, tmp_path / "grey.pth", *LIKE_DETECTRON2, "model.pixel_mean=[127.5,127.5,127.5]"))
