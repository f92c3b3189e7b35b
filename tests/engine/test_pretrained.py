"""Weights of Detectron2 and Caffe2: files made by these libraries, results compared with theirs."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.modeling.postprocessing import detector_postprocess
from omegaconf import OmegaConf
from reference import detectron2_rcnn
from safetensors.torch import save_file
from tiny import LABEL_SPACE, make_sample, tiny_model
from torch import Tensor
from toy import Toy
from weight_sources import (
    LIKE_DETECTRON2,
    TASKS,
    TORCHVISION,
    config,
    imported,
    stock,
    write_zoo_pickle,
)

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.pretrained.class_layers import match_classes
from mtl_rcnn.engine.pretrained.convert import import_weights
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.errors import CheckpointError, ConfigError


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


def test_a_trunk_that_is_not_fully_matched_is_an_error(tmp_path: Path) -> None:
    state: Mapping[str, Tensor] = stock(seed=1).state_dict()
    path = tmp_path / "model.pth"
    torch.save({name: value for name, value in state.items() if "res4.1.conv2" not in name}, path)
    with pytest.raises(CheckpointError, match=r"missing in the file: backbone\.bottom_up\.res4\.1\.conv2\.weight"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))
    torch.save({name: value for name, value in state.items() if "bottom_up" not in name}, path)
    with pytest.raises(CheckpointError, match="no weights of the trunk"):
        imported(config(TASKS, path, *LIKE_DETECTRON2))


def test_names_of_no_known_layout_are_listed(tmp_path: Path) -> None:
    torch.save({"encoder.weight": torch.zeros(2)}, tmp_path / "model.pth")
    with pytest.raises(CheckpointError, match=r"no known layout \(encoder\.weight"):
        imported(config(("detection",), tmp_path / "model.pth"))


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


def test_the_zoos_own_files_expect_their_pixels(tmp_path: Path) -> None:
    write_zoo_pickle(tmp_path / "model.pkl", stock(seed=1), 2)
    with pytest.raises(ConfigError, match=r"model\.pixel_std=\[1,1,1\]"):
        imported(config(TASKS, tmp_path / "model.pkl", *TORCHVISION, LIKE_DETECTRON2[-1]))
    state = stock(seed=1).state_dict() | {"pixel_mean": torch.full((3, 1, 1), 127.5), "pixel_std": torch.ones(3, 1, 1)}
    torch.save({"model": state}, tmp_path / "grey.pth")
    imported(config(TASKS, tmp_path / "grey.pth", *LIKE_DETECTRON2, "model.pixel_mean=[127.5,127.5,127.5]"))
