"""What is particular to labels of images: losses and scores against NumPy, the mean over the image, parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from omegaconf import DictConfig
from PIL import Image
from toy import Toy

from mtl_rcnn.comparison.plan import plan_networks
from mtl_rcnn.config import compose
from mtl_rcnn.config.compose import Composition, config_root
from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.inspection import label_faults
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.target import Sample
from mtl_rcnn.data.views import Views
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.multilabel import Decisions, average_precision, f1_score, multilabel_metrics
from mtl_rcnn.export.torchscript import export_torchscript
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.modeling.slots import DecodedView
from mtl_rcnn.modeling.views import MultiViewNetwork
from mtl_rcnn.runtime import ExportedNetwork
from mtl_rcnn.tasks.image_label import ImageLabelEvaluator, ImageLabelTarget, ImageLabelTask, mean_over_image

SPACE = LabelSpace(
    (),
    {
        "image_labels": [
            {"name": "red", "part": "colour"},
            {"name": "dress", "part": "garment"},
            {"name": "blue", "part": "colour"},
            {"name": "shirt", "part": "garment"},
            {"name": "black", "part": "colour"},
        ]
    },
)
NAMES = ["red", "dress", "blue", "shirt", "black"]
COLOURS, GARMENTS = [0, 2, 4], [1, 3]
FEATURES = {"p2": ShapeSpec(channels=3, stride=4), "p3": ShapeSpec(channels=2, stride=8)}
TARGET = ImageLabelTarget("words", SPACE)
EVERYTHING = {name: index for index, name in enumerate(NAMES)}


def record(
    labels: Any, known: Sequence[str] = NAMES, image_id: int = 3, tasks: tuple[str, ...] | None = None
) -> dict[str, Any]:
    image = {"dataset": "toy", "image_id": image_id, "file_name": "3.png", "tasks": tasks, "annotations": []}
    own = {name: EVERYTHING[name] for name in known}
    return {**image, "vocabularies": {"image_labels": own}} | ({} if labels is None else {"image_labels": labels})


def network(mode: str = "sigmoid", levels: Sequence[str] = ("p2", "p3"), **knobs: Any) -> ImageLabelTask:
    torch.manual_seed(0)
    given = {"mode": mode, "levels": levels, "hidden": 0, "dropout": 0.0, **knobs}
    return ImageLabelTask("words", SPACE, FEATURES, **given)


def pyramid(height: int = 16, width: int = 24, images: int = 3) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(1)
    return {
        name: torch.randn(images, spec.channels, height // spec.stride, width // spec.stride, generator=draw)
        for name, spec in FEATURES.items()
    }


# Labels


def test_a_data_set_says_nothing_of_names_that_are_not_its_own() -> None:
    identity = Geometry.identity(4, 4)
    assert TARGET.load(record(["dress", "red"]), identity).tolist() == [1, 1, 0, 0, 0]
    assert TARGET.load(record(["red"], known=["black", "red"]), identity).tolist() == [1, -1, -1, -1, 0]
    assert TARGET.load(record([]), identity).tolist() == [0, 0, 0, 0, 0], "labelled: nothing holds"
    assert TARGET.load(record(None), identity) is None
    assert TARGET.load(record(["red"], tasks=("boxes",)), identity) is None
    assert TARGET.check(record(None, tasks=("words",))).image is False
    assert TARGET.check(record(["red"])).image is True
    assert TARGET.label_counts(record(["red"], known=["black", "red"])) == {"black": 0, "red": 1}


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        (["rde"], NAMES, r"image 3 \(3\.png\): 'image_labels' names 'rde', .*did you mean 'red'"),
        (["dress"], ["red"], r"names 'dress', which the data set's vocabulary 'image_labels' lacks; known: red"),
        ("red", NAMES, r"is 'red'; expected a list of names"),
        ([1], NAMES, r"is \[1\]; expected a list of names"),
        (["red"], [], r"the data set has no vocabulary 'image_labels'"),
    ],
)
def test_labels_that_do_not_fit_are_told(given: Any, known: Sequence[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        TARGET.check(record(given, known))


def test_two_data_sets_of_different_words_share_a_network(toy: Toy) -> None:
    nodes = [toy.node(), toy.node(name="other", annotations="boxes.json", vocabularies={"image_labels": ["red", "x"]})]
    (first, second), space = build_datasets([DatasetSpec.from_config(node, str(toy.root)) for node in nodes], {})
    target = ImageLabelTarget("words", space)
    identity = Geometry.identity(4, 4)
    assert target.names == ["red", "blue", "day", "night", "x"]
    assert target.load(first.records[0], identity).tolist() == [1, 0, 1, 0, -1]
    spoilt = {**second.records[0], "image_labels": ["x"]}
    assert target.load(spoilt, identity).tolist() == [0, -1, -1, -1, 1]


def test_predictions_become_labels_where_all_are_sure() -> None:
    def written(*scores: float, known: Sequence[str] = NAMES) -> Any:
        label = TARGET.as_label(record(None, known), {"label_scores": torch.tensor(scores)}, 0.9)
        return None if label is None else label.image

    assert written(0.95, 0.05, 0.0, 1.0, 0.01) == {"image_labels": ["red", "shirt"]}
    assert written(0.01, 0.05, 0.0, 0.02, 0.01) == {"image_labels": []}
    assert written(0.95, 0.2, 0.0, 1.0, 0.01) is None
    assert written(0.95, 0.2, 0.0, 1.0, 0.01, known=["red", "shirt"]) == {"image_labels": ["red", "shirt"]}
    assert written(0.95, 0.2, 0.0, 1.0, 0.01, known=[]) is None


# Network


def test_the_mean_leaves_padding_out_and_weighs_the_border_by_its_share() -> None:
    maps = torch.randn(2, 5, 4, 6, dtype=torch.float64)
    sizes = torch.tensor([[16, 24], [10, 13]])
    found = mean_over_image(maps, sizes, 4)
    np.testing.assert_allclose(found[0], maps[0].mean(dim=(1, 2)))
    # As if every cell were 4 x 4 pixels, and the image the upper left 10 x 13 of them.
    pixels = maps[1].numpy().repeat(4, axis=1).repeat(4, axis=2)[:, :10, :13]
    np.testing.assert_allclose(found[1], pixels.mean(axis=(1, 2)))
    spoilt = maps.clone()
    spoilt[1, :, 3:], spoilt[1, :, :, 4:] = 1e9, 1e9
    np.testing.assert_allclose(mean_over_image(spoilt, sizes, 4)[1], found[1])


def test_without_padding_the_head_is_linear_on_the_mean_of_the_features() -> None:
    task, features = network(), pyramid()
    logits = mean_over_image(task(features), torch.tensor([[16, 24]] * 3), task.stride)
    pooled = torch.cat([features[level].mean(dim=(2, 3)) for level in ("p2", "p3")], dim=1)
    (layer,) = task.head
    torch.testing.assert_close(logits, pooled @ layer.weight[:, :, 0, 0].t() + layer.bias)


@pytest.mark.parametrize("hidden", [0, 7])
def test_layers_and_dropout(hidden: int) -> None:
    task, features = network(hidden=hidden, dropout=0.5), pyramid()
    assert not torch.equal(task(features), task(features))
    assert torch.equal(task.eval()(features), task(features))
    assert sum(p.numel() for p in task.parameters()) == (5 * 7 + 7 + 7 * 5 + 5 if hidden else 5 * 5 + 5)


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
def test_losses_equal_numpy(mode: str) -> None:
    task, features = network(mode), pyramid()
    labels = torch.tensor([[1, 1, 0, 0, 0], [-1, 0, 0, 1, -1], [0, 0, 0, 0, 0]])
    sizes = [(16, 24), (9, 21), (16, 3)]
    raw = task(features)
    total, count = task.losses(raw, list(labels), sizes)["cross_entropy"]
    logits = mean_over_image(raw, torch.tensor(sizes), 8).detach().double().numpy()
    expected = 0.0
    if mode == "sigmoid":
        for row, truth in zip(logits, labels.numpy()):
            chance = 1 / (1 + np.exp(-row))
            expected -= sum(np.log(chance[i] if truth[i] else 1 - chance[i]) for i in range(5) if truth[i] >= 0)
    else:
        colours, garments = (_softmax(logits[:, part]) for part in (COLOURS, GARMENTS))
        expected -= np.log(colours[0, 0]) + np.log(garments[0, 0])  # red, dress
        expected -= np.log(colours[1, 0] + colours[1, 2]) + np.log(garments[1, 1])  # red or black: not known; shirt
    assert total.item() == pytest.approx(expected, rel=1e-5)
    assert count.item() == 3
    total.backward()
    assert all(p.grad.abs().sum() > 0 for p in task.parameters())


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
def test_under_autocast_losses_of_what_the_network_said_are_those_of_full_precision(mode: str) -> None:
    task, labels = network(mode), [torch.tensor([1, 1, 0, 0, 0])] * 4
    raw = 7.32 * (2 * torch.stack(labels)[:, :, None, None].float() - 1).repeat(1, 1, 2, 3)
    expected, _ = task.losses(raw, labels, [(16, 24)] * 4)["cross_entropy"]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = task.losses(raw, labels, [(16, 24)] * 4)["cross_entropy"]
    assert found.item() == expected.item() > 0


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
def test_without_labels_nothing_is_learned(mode: str) -> None:
    task, features = network(mode), pyramid()
    total, count = task.losses(task(features)[:0], [], [])["cross_entropy"]
    total.backward()
    assert (total.item(), count.item()) == (0.0, 0.0)
    assert all(not p.grad.any() for p in task.parameters())


def test_infinite_logits_of_unknown_labels_do_no_harm() -> None:
    task = network()
    raw = torch.zeros(1, 5, 2, 3)
    raw[:, 1] = float("inf")
    raw.requires_grad_()
    total, _ = task.losses(raw, [torch.tensor([1, -1, 0, 0, 0])], [(16, 24)])["cross_entropy"]
    assert total.item() == pytest.approx(4 * np.log(2))


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
def test_scores_of_one_image_traced_and_scripted(mode: str) -> None:
    task, features = network(mode).eval().requires_grad_(False), pyramid(images=1)

    def scores(module: Any, pyramid: dict[str, torch.Tensor], size: torch.Tensor) -> torch.Tensor:
        decoded = module.decode(module(pyramid), torch.tensor([16, 24]))
        return module.to_image({"label_maps": decoded["label_maps"][0]}, size, torch.tensor([33, 50]))["label_scores"]

    size, other = torch.tensor([16, 24]), torch.tensor([13, 17])
    wider = pyramid(24, 40, images=1)
    traced = torch.jit.trace(lambda p2, p3, s: scores(task, {"p2": p2, "p3": p3}, s), (*features.values(), size))
    scripted = torch.jit.script(task)
    for given, sides in ((features, size), (features, other), (wider, torch.tensor([20, 37]))):
        expected = scores(task, given, sides)
        torch.testing.assert_close(traced(*given.values(), sides), expected, rtol=0, atol=1e-6)
        assert torch.equal(scores(scripted, given, sides), expected)
        logits = mean_over_image(task(given), sides[None], 8)[0].numpy()
        if mode == "sigmoid":
            np.testing.assert_allclose(expected, 1 / (1 + np.exp(-logits)), rtol=1e-5)
        else:
            for part in (COLOURS, GARMENTS):
                np.testing.assert_allclose(expected[part], _softmax(logits[None, part])[0], rtol=1e-5)


def test_several_views_are_averaged() -> None:
    task = network().eval()
    decoded = [task.decode(task(pyramid(images=1)), torch.tensor([16, 24])), {"label_maps": torch.zeros(1, 5, 2, 3)}]
    views = [
        DecodedView({"label_maps": d["label_maps"][0]}, torch.tensor([16, 24]), bool(i)) for i, d in enumerate(decoded)
    ]
    alone = [task.merge_views([view], torch.tensor([16, 24]))["label_scores"] for view in views]
    assert alone[1].tolist() == [0.5] * 5
    torch.testing.assert_close(
        task.merge_views(views, torch.tensor([16, 24]))["label_scores"], (alone[0] + alone[1]) / 2
    )


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"mode": "softmax"}, r"tasks\.words\.mode=softmax: expected sigmoid or softmax_per_part"),
        ({"levels": ["p2", "p9"]}, r"tasks\.words\.levels=\[p2,p9\]: .* which are p2, p3"),
        ({"levels": []}, r"tasks\.words\.levels=\[\]"),
    ],
)
def test_settings_that_do_not_fit_are_told(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        network(**knobs)


def test_softmax_needs_parts() -> None:
    space = LabelSpace((), {"image_labels": [{"name": "red", "part": "colour"}, {"name": "large"}]})
    with pytest.raises(ConfigError, match="'large' says no 'part'"):
        ImageLabelTask("words", space, FEATURES, mode="softmax_per_part", levels=["p2"], hidden=0, dropout=0.0)


def _softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)


# Scores


def test_average_precision_by_hand() -> None:
    scores, positive = np.array([0.9, 0.8, 0.8, 0.3]), np.array([True, False, True, True])
    # Thresholds 0.9: P 1, R 1/3; 0.8 (two at once): P 2/3, R 2/3; 0.3: P 3/4, R 1.
    assert average_precision(scores, positive) == pytest.approx((1 + 2 / 3 + 3 / 4) / 3)
    assert average_precision(np.zeros(4), positive) == pytest.approx(3 / 4)


def test_average_precision_equals_brute_force() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        scores, positive = rng.integers(0, 12, 40) / 12, rng.random(40) < 0.4
        expected, before = 0.0, 0.0
        for threshold in sorted(set(scores), reverse=True):
            chosen = scores >= threshold
            recall = (chosen & positive).sum() / positive.sum()
            expected += (recall - before) * positive[chosen].mean()
            before = recall
        assert average_precision(scores, positive) == pytest.approx(expected)


def test_metrics_equal_a_loop_over_the_known_entries() -> None:
    rng = np.random.default_rng(1)
    scores, truth = rng.random((60, 5)), rng.choice([-1, 0, 1], (60, 5))
    truth[:, 4] = rng.choice([-1, 0], 60)  # a label that holds nowhere
    truth[:3] = -1
    chosen = scores >= 0.5
    found = {name: metric.value for name, metric in multilabel_metrics(Decisions(scores, chosen, truth), NAMES).items()}
    right, entries, exact, images, counts = 0, 0, 0, 0, np.zeros((5, 4), int)
    for row in range(60):
        known = [i for i in range(5) if truth[row, i] >= 0]
        hits = [chosen[row, i] == truth[row, i] for i in known]
        right, entries = right + sum(hits), entries + len(hits)
        images, exact = images + bool(known), exact + (bool(known) and all(hits))
        for i in known:
            counts[i, 2 * truth[row, i] + chosen[row, i]] += 1
    tn, fp, fn, tp = counts.T
    assert found["binary_accuracy"] == pytest.approx(100 * right / entries)
    assert found["exact_match"] == pytest.approx(100 * exact / images)
    f1 = 2 * tp / (2 * tp + fp + fn)
    assert found["macro_F1"] == pytest.approx(100 * f1[:4].mean())
    assert found["micro_F1"] == pytest.approx(100 * 2 * tp.sum() / (2 * tp + fp + fn).sum())
    assert found["mA"] == pytest.approx(100 * (tp[:4] / (tp + fn)[:4] + tn[:4] / (tn + fp)[:4]).mean() / 2)
    assert found["F1/dress"] == pytest.approx(100 * f1[1])
    assert found["accuracy/blue"] == pytest.approx(100 * (tp + tn)[2] / counts[2].sum())
    ap = [average_precision(scores[truth[:, i] >= 0, i], truth[truth[:, i] >= 0, i] == 1) for i in range(4)]
    assert found["mAP"] == pytest.approx(100 * np.mean(ap))
    assert found["AP/shirt"] == pytest.approx(100 * ap[3])
    assert "AP/black" not in found
    assert f1_score(np.zeros(3, bool), np.zeros(3, bool)) == 0.0


def test_under_softmax_the_best_label_of_each_part_holds() -> None:
    records = [record(["blue", "dress"])]
    scores = dict(zip(NAMES, [0.3, 0.6, 0.36, 0.4, 0.34]))
    rows = [{"image_id": 3, "label_scores": scores}]
    sigmoid = ImageLabelEvaluator("words", SPACE, records).metrics(rows)
    softmax = ImageLabelEvaluator("words", SPACE, records, mode="softmax_per_part").metrics(rows)
    assert sigmoid["exact_match"].value == 0.0
    assert sigmoid["binary_accuracy"].value == pytest.approx(80.0)
    assert softmax["exact_match"].value == 100.0


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
def test_an_image_without_prediction_has_no_label_right(mode: str) -> None:
    records = [record(["red", "dress"]), record(["red", "dress"], image_id=4)]
    row = {"image_id": 3, "label_scores": dict(zip(NAMES, [0.9, 0.9, 0.1, 0.1, 0.1]))}
    found = ImageLabelEvaluator("words", SPACE, records, mode=mode).metrics([row])
    assert found["exact_match"].value == 50.0
    assert "1 of 2 labelled images have no prediction" in found["exact_match"].reason


def test_an_evaluation_of_nothing_says_so() -> None:
    row = {"image_id": 3, "label_scores": dict.fromkeys(NAMES, 0.5)}
    unlabelled = ImageLabelEvaluator("words", SPACE, [record(None)]).metrics([row])
    assert "labelled" in unlabelled["exact_match"].reason
    partly = ImageLabelEvaluator("words", SPACE, [record(["red"]), record(["red"], image_id=4)])
    assert partly.metrics([{**row, "label_scores": {**row["label_scores"], "dress": 0.1}}])["exact_match"].value == 0.0
    with pytest.raises(DataError, match=r"image_id 3: expected 'label_scores' with a number for each of red, dress"):
        partly.metrics([{"image_id": 3, "label_scores": {"red": 1.0}}])


class _Captions:
    def __init__(self) -> None:
        self.texts: list[str] = []

    def caption(self, text: str) -> None:
        self.texts.append(text)


def test_drawings_name_what_holds_of_each_part_or_what_is_nearest() -> None:
    def said(target: ImageLabelTarget, *scores: float) -> list[str]:
        canvas = _Captions()
        target.draw(canvas, {"label_scores": torch.tensor(scores)})
        return canvas.texts

    assert said(TARGET, 0.1, 0.2, 0.99, 0.4, 0.9) == ["colour: blue 99 %, black 90 %", "garment: shirt 40 %"]
    assert said(TARGET, 1.0, 1.0, 0.0, 0.0, 0.0) == ["colour: red", "garment: dress"], "as labels are drawn"
    assert said(TARGET, *[0.0] * 5) == []
    plain = ImageLabelTarget("words", LabelSpace((), {"image_labels": [{"name": n} for n in NAMES]}), shown=2)
    assert said(plain, 0.6, 0.7, 0.99, 0.2, 0.1) == ["blue 99 %", "dress 70 %"]
    assert said(plain, 0.1, 0.2, 0.3, 0.2, 0.1) == ["blue 30 %"]


# One part of the labels

PARTS = {"colour": ["red", "blue", "black"], "garment": ["dress", "shirt"]}


def target_of(part: str) -> ImageLabelTarget:
    return ImageLabelTarget(part, SPACE, part=part)


def test_for_a_part_labels_of_other_parts_do_not_exist() -> None:
    identity = Geometry.identity(4, 4)
    colour, garment = target_of("colour"), target_of("garment")
    assert (colour.names, garment.names) == (PARTS["colour"], PARTS["garment"])
    both = record(["dress", "black"])
    for target in (colour, garment):
        assert list(target.faults(both)) == []
        assert target.check(both).image is True
    assert colour.load(both, identity).tolist() == [0, 0, 1]
    assert garment.load(both, identity).tolist() == [1, 0]
    assert garment.load(record(["black"]), identity).tolist() == [0, 0], "labelled: none of this part holds"
    assert garment.label_counts(both) == {"dress": 1, "shirt": 0}
    some = record(["red", "dress"], known=["red", "dress"])
    assert colour.load(some, identity).tolist() == [1, -1, -1]
    canvas = _Captions()
    garment.draw(canvas, {"garment_scores": torch.tensor([0.2, 0.75])})
    assert canvas.texts == ["garment: shirt 75 %"]
    sample = {"targets": {"garment": torch.tensor([1, -1])}}
    assert garment.as_prediction(sample)["garment_scores"].tolist() == [1.0, 0.0]


def test_an_image_is_labelled_for_the_parts_that_its_data_set_has_words_of() -> None:
    colours = record(["red"], known=PARTS["colour"])
    assert target_of("colour").check(colours).image is True
    assert target_of("garment").check(colours).image is False
    assert target_of("garment").load(colours, Geometry.identity(4, 4)) is None
    assert target_of("garment").label_counts(colours) == {}
    assert target_of("garment").check(record(["red", "dress"], tasks=("colour",))).image is False


@pytest.mark.parametrize(
    ("given", "known", "said"),
    [
        (["dress", "rde"], NAMES, r"names 'rde', .*did you mean 'red'"),
        (["dress"], ["red", "shirt"], r"names 'dress', which the data set's vocabulary 'image_labels' lacks"),
        ("red", NAMES, r"is 'red'; expected a list of names"),
        (["red"], [], r"the data set has no vocabulary 'image_labels'"),
    ],
)
def test_labels_that_are_of_no_part_are_told(given: Any, known: Sequence[str], said: str) -> None:
    with pytest.raises(DataError, match=said):
        target_of("colour").check(record(given, known))


def test_a_label_of_no_part_is_listed_once() -> None:
    targets = {part: target_of(part) for part in PARTS}
    (fault,) = label_faults([record(["rde", "dress"])], targets)
    assert "'rde'" in fault.message


def test_a_part_that_is_not_there_is_told() -> None:
    said = r"tasks\.words\.part=color: .* no such part \(did you mean 'colour'\?\); parts are colour, garment$"
    for build in (
        lambda: network(part="color"),
        lambda: ImageLabelTarget("words", SPACE, part="color"),
        lambda: ImageLabelEvaluator("words", SPACE, [], part="color"),
    ):
        with pytest.raises(ConfigError, match=said):
            build()
    plain = LabelSpace((), {"image_labels": [{"name": name} for name in NAMES]})
    with pytest.raises(
        ConfigError, match=r"tasks\.words\.part=colour: no entry .* says its part; give every entry one"
    ):
        ImageLabelTarget("words", plain, part="colour")


def test_a_part_alone_writes_no_labels() -> None:
    with pytest.raises(ConfigError, match=r"the task 'colour' knows the part 'colour' alone, .*; leave it out"):
        target_of("colour").as_label(record(None), {"colour_scores": torch.tensor([1.0, 0.0, 0.0])}, 0.5)
    assert TARGET.cannot_label() is None


SCORED = [
    (["red", "dress"], NAMES, {"colour": [0.9, 0.2, 0.6], "garment": [0.8, 0.1]}),
    (["blue", "shirt"], NAMES, {"colour": [0.1, 0.8, 0.3], "garment": [0.7, 0.6]}),
    (["black", "dress"], NAMES, {"colour": [0.7, 0.1, 0.4], "garment": [0.3, 0.2]}),
    (["red"], PARTS["colour"], {"colour": [0.6, 0.1, 0.1], "garment": [0.9, 0.9]}),
]
"""Labels, words of the data set, and scores of both parts; garments of the last are not known."""


@pytest.mark.parametrize(
    ("part", "mode", "exact", "binary"),
    [
        ("colour", "sigmoid", 2 / 4, (2 + 3 + 1 + 3) / 12),
        ("colour", "softmax_per_part", 3 / 4, (3 + 3 + 1 + 3) / 12),
        ("garment", "sigmoid", 1 / 3, (2 + 1 + 1) / 6),
        ("garment", "softmax_per_part", 2 / 3, (2 + 0 + 2) / 6),
    ],
)
def test_the_metrics_of_a_part_equal_a_count_by_hand(part: str, mode: str, exact: float, binary: float) -> None:
    records = [record(labels, known, image_id) for image_id, (labels, known, _) in enumerate(SCORED)]
    evaluator = ImageLabelEvaluator(part, SPACE, records, part=part, mode=mode)
    rows = []
    for one, (_, _, scores) in zip(records, SCORED):
        rows += evaluator.rows(one, {f"{name}_scores": torch.tensor(values) for name, values in scores.items()})
    assert list(rows[0]["label_scores"]) == PARTS[part]
    found = evaluator.metrics(rows)
    assert found["exact_match"].value == pytest.approx(100 * exact)
    assert found["binary_accuracy"].value == pytest.approx(100 * binary)
    assert {name.split("/")[1] for name in found if "/" in name} == set(PARTS[part])


# Two parts, two tasks of one network


@pytest.fixture(scope="module")
def garments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise in four folders, five images each."""
    root = tmp_path_factory.mktemp("garments")
    draw = np.random.default_rng(0)
    for name in ("red_dress", "blue_dress", "blue_shirt", "black_shirt"):
        (root / name).mkdir()
        for index in range(5):
            noise = draw.integers(0, 256, (12, 8, 3), dtype=np.uint8).repeat(4, axis=0).repeat(4, axis=1)
            Image.fromarray(noise).save(root / name / f"{index}.png")
    return root


def fashion(garments: Path, *overrides: str, experiment: str = "fashion_two_tasks") -> DictConfig:
    small = ["model.backbone.width=8", "model.backbone.fpn_channels=16", "data.side=64", "data.workers=0"]
    return compose("train", [f"experiment={experiment}", f"data.root={garments}", *small, *overrides])


def network_of(cfg: DictConfig) -> tuple[MultiTaskRCNN, LabelSpace, list[Sample]]:
    (dataset,), space = train_datasets(cfg)
    mapper = Mapper(build_targets(cfg, space), [], training=True)
    return build_model(cfg, space), space, [mapper(one, index) for index, one in enumerate(dataset.records[::3])]


def losses_of(model: MultiTaskRCNN, samples: Sequence[Sample]) -> Mapping[str, tuple[torch.Tensor, torch.Tensor]]:
    return model.train().losses(samples)[0]


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
def test_the_losses_of_each_part_are_those_of_a_network_that_knows_no_other(mode: str, garments: Path) -> None:
    modes = [f"tasks.{part}.mode={mode}" for part in PARTS]
    joint, space, samples = network_of(fashion(garments, *modes))
    assert [entry["name"] for entry in space.vocabularies["image_labels"]] == ["black", "blue", "red", "dress", "shirt"]
    found = losses_of(joint, samples)
    assert set(found) == {"colour/cross_entropy", "garment/cross_entropy"}
    for part in PARTS:
        only = [f"data.only=[{part}]", f"tasks.image_label.mode={mode}"]
        alone, small, own = network_of(fashion(garments, *only, experiment="fashion"))
        assert len(small.vocabularies["image_labels"]) == len(PARTS[part])
        alone.backbone.load_state_dict(joint.backbone.state_dict())
        alone.image_tasks["image_label"].load_state_dict(joint.image_tasks[part].state_dict())
        expected, count = losses_of(alone, own)["image_label/cross_entropy"]
        loss, images = found[f"{part}/cross_entropy"]
        assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
        assert loss.item() > 0
        assert images.item() == count.item() == len(samples)


@pytest.mark.parametrize("mode", ["sigmoid", "softmax_per_part"])
@pytest.mark.parametrize("method", ["trace", "script"])
def test_a_file_of_two_parts_predicts_what_the_network_does(
    method: str, mode: str, garments: Path, tmp_path: Path
) -> None:
    model, space, samples = network_of(fashion(garments, *(f"tasks.{part}.mode={mode}" for part in PARTS)))
    images = [sample["image"] for sample in samples[:2]]
    preprocessing = {"short_edge": None, "max_size": None, "channel_order": "RGB"}
    manifest = export_torchscript(model.eval(), space, images, tmp_path, preprocessing, {}, 0, method)
    assert [output["name"] for output in manifest["outputs"]] == ["colour_scores", "garment_scores"]
    assert [e["name"] for e in manifest["colour_image_labels"]] == ["black", "blue", "red"]
    assert [e["name"] for e in manifest["garment_image_labels"]] == ["dress", "shirt"]
    size = torch.tensor(images[0].shape[-2:])
    (eager,) = model.predict_tensors(images[:1], [size])
    read = ExportedNetwork(tmp_path)(images[0])
    assert {name: len(value) for name, value in read.items()} == {"colour_scores": 3, "garment_scores": 2}
    torch.testing.assert_close(read, eager, rtol=0, atol=1e-5)
    if mode == "softmax_per_part":
        assert all(value.sum().item() == pytest.approx(1) for value in read.values())


def test_several_views_are_averaged_part_by_part(garments: Path) -> None:
    model, _, _ = network_of(fashion(garments))
    image = np.random.default_rng(1).integers(0, 256, (64, 48, 3), dtype=np.uint8)
    views = Views([[]], flip=True)
    (found,) = MultiViewNetwork(InferenceNetwork(model.eval()))([views.sample(image)])
    seen = [model.predict([{"image": view.image, "height": 64, "width": 48}])[0] for view in views(image)]
    assert len(seen) == 2
    for name in ("colour_scores", "garment_scores"):
        torch.testing.assert_close(found[name], (seen[0][name] + seen[1][name]) / 2)
    assert set(found) == {"colour_scores", "garment_scores"}


def test_two_tasks_of_all_labels_are_one_too_many(garments: Path) -> None:
    cfg = fashion(garments, "tasks.colour.part=null", "tasks.garment.part=null")
    with pytest.raises(ConfigError, match="tasks colour and garment both predict 'label_scores'"):
        network_of(cfg)


def test_a_run_trains_and_scores_both(garments: Path, tmp_path: Path) -> None:
    short = ["solver.max_iter=2", "solver.warmup_iters=1", "solver.batch_size=4", "device=cpu", "threads=1"]
    quiet = ["report.enabled=false", "evaluation.samples=1", f"output_dir={tmp_path / 'run'}"]
    outcome = train(fashion(garments, *short, *quiet))
    for part, names in PARTS.items():
        assert f"fashion_val/{part}/exact_match" in outcome.metrics
        rows = json.loads((outcome.folder / "predictions" / f"fashion_val_{part}.json").read_text())
        assert len(rows) == 4
        assert all(set(row["label_scores"]) == set(names) for row in rows)


def test_a_comparison_of_two_parts_has_a_network_for_each_and_one_for_both() -> None:
    words = ("experiment=fashion_two_tasks", "data.root=x")
    networks = plan_networks(Composition("compare", words, str(config_root())))
    assert [(n.own_of, set(n.tasks)) for n in networks] == [
        ("colour", {"colour"}),
        ("garment", {"garment"}),
        (None, {"colour", "garment"}),
    ]
    for one in networks:
        assert all(node.part == node.target.part == node.evaluator.part == name for name, node in one.cfg.tasks.items())
