"""What is particular to attributes: groups, labels in part, mirrors, losses by hand, decoding, two evaluations."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
import torch
from coco_scenes import jittered_rows, random_truth
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import Tensor

from mtl_rcnn.data.attribute_groups import read_groups
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Prediction
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.tasks.attribute import AttributeEvaluator, AttributeTarget, AttributeTask
from mtl_rcnn.visualize.canvas import Canvas

COLOUR = {"name": "colour", "type": "categorical", "values": ["red", "green", "blue"]}
MARKS = {"name": "marks", "type": "multilabel", "values": ["rim", "dots"]}
PARKED = {"name": "parked", "type": "binary", "classes": ["car"]}
SIDE = {"name": "side", "type": "categorical", "values": ["left", "front", "right"], "flip_pairs": [["left", "right"]]}
AGE = {"name": "age", "type": "scalar", "mean": 40.0, "std": 20.0, "classes": ["person"]}
WEIGHT = {"name": "weight", "type": "scalar"}
EVERYTHING = (COLOUR, AGE, MARKS, PARKED, SIDE, WEIGHT)
CLASSES = ("person", "car", "tree")
FEATURES = {
    name: ShapeSpec(channels=8, stride=stride) for name, stride in (("p2", 4), ("p3", 8), ("p4", 16), ("p5", 32))
}
KNOBS: dict[str, Any] = {
    "conv_dims": [],
    "fc_dims": [12],
    "norm": "",
    "scalars": {},
    "class_hidden": 0,
    "focal_gamma": 0.0,
    "focal_alpha": -1.0,
    "smooth_l1_beta": 1.0,
    "pooler_resolution": 3,
}


def expit(z: float) -> float:
    return 1 / (1 + np.exp(-z))


def log_softmax(z: np.ndarray) -> np.ndarray:
    return z - np.log(np.exp(z).sum())


def space(*groups: dict[str, Any]) -> LabelSpace:
    return LabelSpace(tuple({"name": name} for name in CLASSES), {"attributes": groups or EVERYTHING})


def target(*groups: dict[str, Any], **knobs: Any) -> AttributeTarget:
    return AttributeTarget("attribute", space(*groups), **knobs)


def record(*labels: Any, classes: tuple[int, ...] = (), tasks: tuple[str, ...] | None = None) -> dict[str, Any]:
    annotations = [
        {"id": 50 + i, "category_id": (*classes, *[0] * 9)[i], "iscrowd": 0, "bbox": [10 * i, 5, 8, 20]}
        | ({} if label is None else {"attributes": label})
        for i, label in enumerate(labels)
    ]
    image = {"dataset": "toy", "image_id": 3, "height": 40, "width": 60, "file_name": "3.png"}
    return {**image, "tasks": tasks, "annotations": annotations, "classes": (0, 1, 2), "category_ids": (4, 7, 9)}


def load(given: dict[str, Any], geometry: Geometry | None = None) -> dict[str, Any]:
    label = target().load(given, given["annotations"], geometry or Geometry.identity(40, 60))
    assert label is not None
    return label


def test_groups_stand_in_order_with_scalars_last() -> None:
    groups = {group.name: group for group in read_groups(space(), "attribute")}
    assert list(groups) == ["colour", "marks", "parked", "side", "age", "weight"]
    assert [group.start for group in groups.values()] == [0, 3, 5, 6, 0, 1]
    assert groups["parked"].classes == {1}
    assert groups["colour"].classes == {0, 1, 2}
    assert groups["side"].mirror == (2, 1, 0)
    assert (groups["age"].mean, groups["age"].std, groups["weight"].std) == (40.0, 20.0, 1.0)
    assert groups["marks"].labels == ["marks.rim", "marks.dots"]
    assert groups["parked"].labels == ["parked"]


def test_labels_in_part() -> None:
    label = load(
        record(
            {"colour": "green", "marks": [], "age": 31, "side": None},
            {"parked": False, "weight": 2.5},
            {},
            None,
            classes=(0, 1, 0, 2),
        )
    )
    values = label["gt_attribute_values"].tolist()
    assert values[0] == [0, 1, 0, 0, 0, -1, -1, -1, -1]
    assert values[1] == [-1] * 5 + [0] + [-1] * 3
    assert values[2] == values[3] == [-1] * 9
    scalars = label["gt_attribute_scalars"]
    assert scalars[0, 0] == 31
    assert scalars[1, 1] == 2.5
    assert scalars.isnan().sum() == 6
    assert label["gt_has_attribute"].tolist() == [True, True, False, False]


def test_a_mirror_swaps_what_flip_pairs_say() -> None:
    mirrored = Geometry(T.TransformList([T.HFlipTransform(60)]), 40, 60)
    label = load(record({"colour": "red", "side": "left"}, {"side": "front"}), mirrored)["gt_attribute_values"]
    assert label[:, 6:].tolist() == [[0, 0, 1], [0, 1, 0]]
    assert label[0, :3].tolist() == [1, 0, 0]


def test_what_counts_as_labelled() -> None:
    assert target().check(record({"colour": "red"}, {}, None)).instances == 1
    assert target().check(record()).image
    assert not target().check(record(None, {})).image
    assert target().check(record({}, tasks=("attribute",))).image
    assert not target().check(record({"colour": "red"}, tasks=("detection",))).image
    assert target().load(record({"colour": "red"}, tasks=("detection",)), [], Geometry.identity(40, 60)) is None
    crowd = record({"colour": "red"})
    crowd["annotations"][0]["iscrowd"] = 1
    assert target().check(crowd).instances == 0


@pytest.mark.parametrize(
    ("label", "said"),
    [
        (
            {"color": "red"},
            r"has the attribute 'color', which the vocabulary 'attributes' lacks \(did you mean 'colour'",
        ),
        (
            {"occluded": True},
            "it has colour, marks, parked, side, age, weight: add it there, or name it in tasks.attri",
        ),
        (
            {"colour": "geen"},
            r"has the attribute colour='geen', which is not one of red, green, blue \(did you mean 'gr",
        ),
        ({"marks": ["rim", "spots"]}, "has the attribute marks='spots', which is not one of rim, dots"),
        ({"colour": ["red"]}, r"colour=\['red'\]: expected one name of red, green, blue"),
        ({"marks": "rim"}, "marks='rim': expected a list of names of rim, dots"),
        ({"age": "31"}, "age='31': expected a finite number"),
        ({"age": float("nan")}, "age=nan: expected a finite number"),
        ({"age": True}, "age=True: expected a finite number"),
        ({"parked": True}, "has the attribute 'parked', but is a 'person': the attribute belongs to car"),
        (["red"], r"has attributes \['red'\]: expected an object, group -> value"),
    ],
)
def test_a_label_that_does_not_fit_names_the_annotation(label: Any, said: str) -> None:
    with pytest.raises(DataError, match=rf"dataset 'toy', image 3, annotation 51 .*{said}"):
        target().check(record({"colour": "red"}, label))


def test_a_binary_label_is_true_or_false() -> None:
    with pytest.raises(DataError, match="parked='yes': expected true or false"):
        target().check(record({"parked": "yes"}, classes=(1,)))


def test_all_faults_of_an_annotation_are_told_and_share_one_repair() -> None:
    faults = list(target().faults(record({"color": "red", "age": "old", "marks": ["rim"]})))
    assert [fault.kind for fault in faults] == ["unknown attribute", "attribute of another type"]
    assert [dict(fault.repair.fields) for fault in faults] == [{"attributes": {"marks": ["rim"]}}] * 2


def test_declared_attributes_may_not_be_missing_but_unknown() -> None:
    with pytest.raises(
        DataError, match=r"annotation 51 has no 'attributes', but the dataset declares .* add them \(\{\}"
    ):
        target().check(record({}, None, tasks=("attribute",)))
    assert target(PARKED).check(record(None, tasks=("attribute",))).image, "no group belongs to a person"


def test_attributes_of_other_tools_may_be_left_aside() -> None:
    assert target(ignore=["occluded"]).check(record({"occluded": False, "colour": "red"})).instances == 1


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        (
            {"name": "a", "type": "categoric", "values": ["x"]},
            r"'a' has the type 'categoric'; .* \(did you mean 'categ",
        ),
        ({"name": "a"}, "'a' has the type None; expected categorical, multilabel, binary, scalar"),
        ({"name": "a", "type": "categorical"}, "'a' is categorical and has the values None; expected a list of names"),
        ({"name": "a", "type": "multilabel", "values": ["x", "x"]}, ".* expected a list of names that differ"),
        ({"name": "a", "type": "multilabel", "values": "xy"}, ".* expected a list of names that differ"),
        ({"name": "a", "type": "binary", "values": ["no", "yes"]}, "'a' is binary and has values"),
        ({"name": "a", "type": "scalar", "std": 0}, "'a' has the std 0; expected a number above 0"),
        ({"name": "a", "type": "scalar", "mean": "x"}, "'a' has the mean 'x'; expected a number"),
        ({"name": "a", "type": "binary", "classes": "car"}, "'a' has the classes 'car'; expected a list of names"),
        ({**MARKS, "flip_pairs": [["rim", "dot"]]}, r"'marks' has the flip_pairs .*; expected pairs of its values"),
    ],
)
def test_a_vocabulary_that_does_not_fit_names_the_entry(entry: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=rf"vocabulary 'attributes': {said}"):
        target(entry)


def test_a_class_that_is_not_there_is_told(caplog: pytest.LogCaptureFixture) -> None:
    assert read_groups(space({"name": "a", "type": "binary", "classes": ["cars", "tree"]}), "x")[0].classes == {2}
    assert "attribute 'a' belongs to 'cars', which is no class of the network (did you mean 'car'?)" in caplog.text


def task(*groups: dict[str, Any], **knobs: Any) -> AttributeTask:
    torch.manual_seed(0)
    made = AttributeTask("attribute", space(*groups), FEATURES, **{**KNOBS, **knobs})
    if made.class_embedding is not None:
        torch.nn.init.normal_(made.class_embedding.weight)
    torch.nn.init.normal_(made.predictor.weight)
    return made.eval()


def regions(*labels: Any, classes: tuple[int, ...] = ()) -> list[Instances]:
    given = record(*labels, classes=classes)
    fields = load(given)
    known = fields["gt_has_attribute"]
    image = Instances((40, 60), gt_classes=torch.tensor([e["category_id"] for e in given["annotations"]]), **fields)
    image.proposal_boxes = Boxes(torch.zeros(len(known), 4))
    return [nothing(), image[known]]


def nothing() -> Instances:
    """The regions of an image without objects."""
    return Instances((40, 60), gt_classes=torch.zeros(0, dtype=torch.int64))


LABELS = (
    {"colour": "green", "marks": ["dots"], "age": 31},
    {"parked": True, "weight": 2.5, "side": "left"},
    {"colour": "blue", "weight": -9.0},
)


def test_losses_by_hand() -> None:
    made, images = task(), regions(*LABELS, classes=(0, 1, 2))
    raw = torch.randn(3, 11, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    logits = raw.numpy()
    found = {part: (float(loss), float(count)) for part, (loss, count) in made.losses(raw, images).items()}
    ticked = [(logits[0, 3], 0), (logits[0, 4], 1), (logits[1, 5], 1)]
    assert found["bce"] == (pytest.approx(-sum(np.log(expit(z if y else -z)) for z, y in ticked)), 3)
    chosen = [log_softmax(logits[0, :3])[1], log_softmax(logits[1, 6:9])[0], log_softmax(logits[2, :3])[2]]
    assert found["ce"] == (pytest.approx(-sum(chosen)), 3)
    distances = np.abs([logits[0, 9] - (31 - 40) / 20, logits[1, 10] - 2.5, logits[2, 10] + 9])
    assert distances.max() > 1 > distances.min()
    smooth = np.where(distances < 1, 0.5 * distances**2, distances - 0.5)
    assert found["smooth_l1"] == (pytest.approx(smooth.sum()), 3)


def test_focal_loss_by_hand() -> None:
    made, images = task(MARKS, focal_gamma=2.0, focal_alpha=0.25), [nothing()]
    image = Instances((40, 60), gt_classes=torch.tensor([0]))
    image.gt_attribute_values, image.gt_attribute_scalars = torch.tensor([[1, 0]]), torch.zeros(1, 0)
    loss, count = made.losses(torch.tensor([[0.3, -1.2]]), [*images, image])["bce"]
    expected = -0.25 * (1 - expit(0.3)) ** 2 * np.log(expit(0.3)) - 0.75 * expit(-1.2) ** 2 * np.log(expit(1.2))
    assert (float(loss), float(count)) == (pytest.approx(expected, abs=1e-6), 2)


def test_what_is_unknown_does_not_reach_the_weights() -> None:
    made = task()
    raw = torch.full((3, 11), torch.nan, requires_grad=True)
    with torch.no_grad():
        raw[0, :5], raw[0, 9], raw[1, 5:9], raw[1, 10], raw[2, :3], raw[2, 10] = 0.1, 0.1, 0.1, 0.1, 0.1, 0.1
    total = sum(loss for loss, _ in made.losses(raw, regions(*LABELS, classes=(0, 1, 2))).values())
    assert torch.isfinite(total)
    total.backward()
    assert torch.isfinite(raw.grad).all()
    assert (raw.grad[2, 3:10] == 0).all()


def test_decoding_by_hand() -> None:
    raw = torch.randn(3, 11, generator=torch.Generator().manual_seed(1))
    found = task().decode(raw, torch.zeros(3, 4), torch.tensor([0, 1, 2]), torch.zeros(3, dtype=torch.int64))
    scores, scalars = found["attribute_scores"], found["attribute_scalars"]
    torch.testing.assert_close(scores[:, :3], raw[:, :3].softmax(dim=1))
    torch.testing.assert_close(scores[:, 3:5], raw[:, 3:5].sigmoid())
    assert scores[:, 5].tolist() == [0.0, float(raw[1, 5].sigmoid()), 0.0], "only cars are parked"
    assert scalars[:, 0].tolist() == [pytest.approx(float(raw[0, 9]) * 20 + 40, rel=1e-6), 0.0, 0.0]
    torch.testing.assert_close(scalars[:, 1], raw[:, 10])


def test_the_class_is_seen_where_asked_for() -> None:
    made, pooled = task(class_hidden=6), torch.rand(2, 8, 3, 3).expand(2, -1, -1, -1)
    with torch.no_grad():
        raw = made(pooled[:1].expand(2, -1, -1, -1))
        assert raw.shape == (2, 6)
        found = made.grids(raw, torch.tensor([0, 1]))["attribute_scores"]
        hidden = made.hidden(made.head(pooled[:1])) + made.class_embedding.weight[1]
        expected = made.predictor(hidden.relu())
    assert not torch.equal(found[0, :5], found[1, :5])
    torch.testing.assert_close(found[1, :3], expected[0, :3].softmax(dim=0))
    losses = made.losses(made(pooled), regions(*LABELS[:2], classes=(0, 1)))
    sum(loss for loss, _ in losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in made.parameters())


@pytest.mark.parametrize("hidden", [0, 6])
@pytest.mark.parametrize(
    "groups", [EVERYTHING, (MARKS,), (COLOUR, SIDE), (WEIGHT,)], ids=["all", "bce", "ce", "scalar"]
)
def test_any_kinds_of_groups_script_and_trace(groups: tuple[dict[str, Any], ...], hidden: int) -> None:
    made = task(*groups, class_hidden=hidden)

    class Whole(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.task = made

        def forward(self, pooled: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
            found = self.task.decode(self.task(pooled), torch.zeros_like(pooled[:, 0, 0]), classes, classes)
            return found["attribute_scores"], found["attribute_scalars"]

    def inputs(number: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(number)
        return torch.rand(number, 8, 3, 3, generator=generator), torch.arange(number) % 3

    traced, scripted = torch.jit.trace(Whole(), inputs(2)), torch.jit.script(Whole())
    for number in (5, 1, 0):
        expected = Whole()(*inputs(number))
        for found in (traced(*inputs(number)), scripted(*inputs(number))):
            assert all(torch.allclose(one, other) for one, other in zip(found, expected, strict=True))
    (first, second), images = made.outputs(), [nothing()]
    assert (first.shape, second.shape) == (f"(N, {made.num_values})", f"(N, {made.num_scalars})")
    losses = made.losses(made(torch.zeros(0, 8, 3, 3)), images)
    assert [loss.item() for loss, _ in losses.values()] == [0.0, 0.0, 0.0]


def test_unflip_swaps_channels_or_says_that_it_cannot() -> None:
    raw = torch.randn(2, 11)
    assert torch.equal(task().unflip(raw), raw[:, [0, 1, 2, 3, 4, 5, 8, 7, 6, 9, 10]])
    assert torch.equal(task(COLOUR, class_hidden=4).unflip(raw), raw)
    with pytest.raises(
        ConfigError, match="class_hidden and flip_pairs of the vocabulary 'attributes' do not go together"
    ):
        task(SIDE, class_hidden=4).unflip(raw)


def test_scalars_are_normalised_as_the_configuration_says(caplog: pytest.LogCaptureFixture) -> None:
    made = task(scalars={"weight": [3, 0.5]})
    assert (made.mean.tolist(), made.std.tolist()) == ([40.0, 3.0], [20.0, 0.5])
    assert not caplog.text
    task(WEIGHT)
    assert "the scalar attribute 'weight' is not normalised: set tasks.attribute.scalars.weight=" in caplog.text
    with pytest.raises(
        ConfigError, match=r"scalars.wight: no such scalar group \(did you mean 'weight'\?\); there are age"
    ):
        task(scalars={"wight": [0, 1]})
    with pytest.raises(ConfigError, match=r"scalars.weight=\[3\]: expected \[mean, standard deviation above 0\]"):
        task(scalars={"weight": [3]})


def test_the_manifest_says_what_each_column_is() -> None:
    described = {entry["name"]: entry for entry in json.loads(json.dumps(task().manifest()))["attributes"]}
    assert described["side"] == {
        "name": "side",
        "type": "categorical",
        "values": ["left", "front", "right"],
        "output": "attribute_scores",
        "offset": 6,
        "classes": [0, 1, 2],
    }
    assert (described["weight"]["output"], described["weight"]["offset"]) == ("attribute_scalars", 1)


RECORDS = [
    record({"colour": "green", "marks": ["dots"], "age": 31}, {"parked": True, "weight": 2.0}, None, classes=(0, 1, 2)),
    {**record({"colour": "red", "marks": []}, {"colour": "blue"}), "image_id": 4},
]
for number, entry in enumerate(RECORDS[1]["annotations"]):
    entry["id"] = 70 + number


def evaluator(**knobs: Any) -> AttributeEvaluator:
    return AttributeEvaluator("attribute", space(), RECORDS, **knobs)


def truth(image: dict[str, Any]) -> Prediction:
    """The labels of an image as its prediction, of all its objects."""
    label = load(image)
    boxes = torch.tensor([entry["bbox"] for entry in image["annotations"]], dtype=torch.float64)
    boxes[:, 2:] += boxes[:, :2]
    return {
        "boxes": boxes,
        "classes": torch.tensor([entry["category_id"] for entry in image["annotations"]]),
        "scores": torch.ones(len(boxes)),
        "attribute_scores": (label["gt_attribute_values"] == 1).float(),
        "attribute_scalars": label["gt_attribute_scalars"],
    }


def all_rows(change: Any = None) -> list[dict[str, Any]]:
    rows = []
    for image in RECORDS:
        prediction = truth(image)
        if change is not None:
            change(image, prediction)
        rows += evaluator().rows(image, prediction) + evaluator().truth_rows(image, image["annotations"], prediction)
    return json.loads(json.dumps(rows, allow_nan=False))


def values(rows: list[dict[str, Any]], **knobs: Any) -> dict[str, float]:
    return {name: metric.value for name, metric in evaluator(**knobs).metrics(rows).items()}


def test_perfect_predictions_score_perfectly_both_ways() -> None:
    found = values(all_rows())
    for name in ("AP_iou", "AP_iou_f1", "AP_iou_f1_positive", "det/found"):
        assert found[name] == pytest.approx(100)
    for side in ("gt", "det"):
        for name in ("mAP", "mA", "micro_F1", "macro_F1", "accuracy", "accuracy/colour", "AP/marks.dots"):
            assert found[f"{side}/{name}"] == pytest.approx(100), name
        assert found[f"{side}/MAE/age"] == found[f"{side}/RMSE/weight"] == 0.0
        assert f"{side}/AP/side.left" not in found, "nothing is known of it"
    assert "AP_iou_f1/tree" not in found, "nothing is known of it"


def test_rows_say_what_they_mean() -> None:
    rows = all_rows()
    assert [row.get("annotation_id") for row in rows] == [None] * 3 + [50, 51] + [None] * 2 + [70, 71]
    assert rows[1]["category_id"] == 7
    assert rows[1]["bbox"] == [10.0, 5.0, 8.0, 20.0]
    assert rows[1]["attributes"] == {"colour": "red", "marks": [], "parked": True, "side": "left", "weight": 2.0}
    assert set(rows[0]["attributes"]) == {"colour", "marks", "side", "age", "weight"}
    assert rows[0]["attributes"]["age"] == 31.0
    assert rows[0]["attributes"]["weight"] is None


def test_wrong_attributes_by_hand() -> None:
    def change(image: dict[str, Any], prediction: Prediction) -> None:
        if image["image_id"] == 3:
            prediction["attribute_scores"][0, :5] = torch.tensor([0.6, 0.3, 0.1, 0.7, 0.9])
            prediction["attribute_scalars"][0, 0] = 33.0
            prediction["attribute_scalars"][1, 1] = 1.0

    found = values(all_rows(change))
    assert found["gt/accuracy/colour"] == pytest.approx(200 / 3)
    assert found["gt/MAE/age"] == found["gt/RMSE/age"] == pytest.approx(2.0)
    assert found["gt/MAE/weight"] == pytest.approx(1.0)
    # 14 entries are known: three colours of three objects, two marks of two, one parked; three are wrong.
    assert found["gt/binary_accuracy"] == pytest.approx(100 * (1 - 3 / 14))
    # Person 50: marks rim and dots where dots holds, red where green holds: 1 hit, 2 false, 1 missed: F1 2/5; of what
    # does not hold (red, blue, rim): 1 hit, 3 errors, also 2/5. Below all thresholds, so that of three persons, equal
    # in score, the first is never found: precision 2/3 up to recall 2/3, the 67th of 101.
    assert found["AP_iou/person"] == pytest.approx(100)
    assert found["AP_iou_f1/person"] == found["AP_iou_f1_positive/person"] == pytest.approx(100 * 67 * (2 / 3) / 101)
    assert found["AP_iou_f1/car"] == pytest.approx(100)
    assert found["AP_iou_f1"] == pytest.approx((found["AP_iou_f1/person"] + 100) / 2)
    assert found["det/found"] == 100


def test_true_negatives_lift_one_of_the_two() -> None:
    def silent(_: dict[str, Any], prediction: Prediction) -> None:
        prediction["attribute_scores"][:, 3:6] = 0.0

    found = values(all_rows(silent))
    # The car is parked, and nothing else is known of it: both find it wrong. Person 50 has dots, which is missed: F1 of
    # what holds 2/3, of what does not (red, blue, rim) 6/7.
    assert found["AP_iou_f1/car"] == found["AP_iou_f1_positive/car"] == 0
    assert found["AP_iou_f1_positive/person"] < found["AP_iou_f1/person"] < 100


def test_unknown_objects_are_no_errors_and_need_not_be_found() -> None:
    rows = all_rows()
    tree = [row for row in rows if row["category_id"] == 9]
    assert len(tree) == 1
    assert values([row for row in rows if row not in tree]) == values(rows)
    assert values(rows, other_classes=True) == values(rows), "trees have groups"
    again = [{**row, "score": 0.9} for row in tree]
    assert values([*rows, *again])["AP_iou_f1"] == pytest.approx(100)


def test_classes_without_groups_count_by_their_place_if_asked() -> None:
    limited = space({**COLOUR, "classes": ["person"]})
    rows = [
        row
        for image in RECORDS
        for row in AttributeEvaluator("attribute", limited, RECORDS).rows(
            image, truth(image) | {"attribute_scores": truth(image)["attribute_scores"][:, :3],
                                   "attribute_scalars": torch.zeros(len(image["annotations"]), 0)}
        )
        if row["category_id"] != 7
    ]  # fmt: skip
    records = [{**image, "annotations": [dict(entry) for entry in image["annotations"]]} for image in RECORDS]
    for image in records:
        for entry in image["annotations"]:
            entry["attributes"] = {k: v for k, v in entry.get("attributes", {}).items() if k == "colour"}
    plain = AttributeEvaluator("attribute", limited, records).metrics(rows)
    assert plain["AP_iou_f1"].value == pytest.approx(100)
    others = AttributeEvaluator("attribute", limited, records, other_classes=True).metrics(rows)
    # Ten thresholds of F1 for the class with a group, one cell each for car (never found) and tree: fp_eval.py's mean.
    assert others["AP_iou_f1"].value == pytest.approx(100 * 11 / 12)
    assert others["AP_iou"].value == pytest.approx(100 * 2 / 3)


def test_labels_that_a_data_set_does_not_declare_are_unknown() -> None:
    records = [RECORDS[0], {**RECORDS[1], "tasks": ("detection",)}]
    made = AttributeEvaluator("attribute", space(), records)
    rows = [row for image in RECORDS for row in made.rows(image, truth(image))]
    assert made.truth_rows(records[1], records[1]["annotations"], truth(RECORDS[1])) == []
    found = made.metrics(rows)
    assert found["AP_iou_f1"].value == pytest.approx(100)
    assert "det/AP/colour.blue" not in found


def test_a_malformed_evaluation_set_is_refused() -> None:
    records = [record({"colour": "purple", "occluded": True})]
    with pytest.raises(DataError, match="annotation 50 has the attribute colour='purple'"):
        AttributeEvaluator("attribute", space(), records)
    records[0]["annotations"][0]["attributes"]["colour"] = "red"
    AttributeEvaluator("attribute", space(), records)


def test_only_chosen_classes_are_scored() -> None:
    made = evaluator()
    made.classes = (1,)
    found = made.metrics(all_rows())
    assert {name for name in found if name.startswith("AP_iou/")} == {"AP_iou/car"}
    assert "gt/accuracy/colour" not in found
    assert found["gt/accuracy/parked"].value == 100


def test_without_rows_of_a_kind_it_says_so() -> None:
    rows = all_rows()
    found = evaluator().metrics([row for row in rows if row.get("annotation_id") is None])
    assert found["gt/mAP"].reason == "no object of known attributes was looked at"
    assert found["det/mAP"].value == pytest.approx(100)
    found = evaluator().metrics([row for row in rows if row.get("annotation_id") is not None])
    assert found["AP_iou_f1"].reason == "no detections"
    assert found["gt/mAP"].value == pytest.approx(100)
    assert found["det/mAP"].reason == "no object of known attributes was looked at"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"attribute_scores": [0.1]}, r"results row 1 .*'attribute_scores' is \[0.1\], expected a list of 9 numbers"),
        ({"attribute_scalars": "x"}, "'attribute_scalars' is 'x', expected a list of 2 numbers"),
        ({"annotation_id": 99}, "annotation_id 99 is not in the dataset"),
        ({"annotation_id": [50]}, r"annotation_id \[50\] is not in the dataset"),
        ({"bbox": [1, 2]}, "'bbox' is"),
    ],
)
def test_rows_of_another_form_are_named(change: dict[str, Any], said: str) -> None:
    rows = all_rows()
    rows[1] |= change
    with pytest.raises(DataError, match=said):
        evaluator().metrics(rows)


FASHIONPEDIA = {6: 0.19687311695033563, 294: 0.15654372531758243}
"""AP_IoU+F1 of the scenes below by Fashionpedia's own `FPEval` (fashionpedia 1.1, scikit-learn 1.7.2, pycocotools
2.0.7), by their number of attributes."""
WITH_ATTRIBUTES = (0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 28, 29, 31, 32, 33)
"""Of Fashionpedia's 46 classes."""


def fashion_scenes(number: int) -> tuple[list[dict[str, Any]], list[dict[str, Any]], np.ndarray, np.ndarray]:
    """COCO annotations and detections in the form of Fashionpedia's files, and (N, V) which attributes each has."""
    rng = np.random.default_rng(3)
    truth = random_truth(rng, images=60, classes=46)
    annotations, rows = truth["annotations"], []
    for entry in annotations:
        entry["category_id"] = int(rng.choice([0, 1, 2, 10, 20, 30]))
    holds = np.zeros((len(annotations), number), dtype=bool)
    for values in holds:
        values[rng.choice(number, size=min(number, int(rng.integers(0, 4))), replace=False)] = True
    rows = jittered_rows(rng, truth, "bbox")
    said = np.zeros((len(rows), number), dtype=bool)
    for row, values in zip(rows, said):
        key = (row["image_id"], row["category_id"])
        near = [index for index, e in enumerate(annotations) if (e["image_id"], e["category_id"]) == key]
        if near:
            values |= holds[near[rng.integers(len(near))]]
        values ^= [rng.random() < 0.3 / number * 2 for _ in range(number)]
    return truth, rows, holds, said


@pytest.mark.parametrize("number", FASHIONPEDIA)
def test_the_figure_is_fashionpedias_own(number: int) -> None:
    truth, rows, holds, said = fashion_scenes(number)
    names = [f"v{index}" for index in range(number)]
    classes = [f"class{index}" for index in range(46)]
    group = {"name": "all", "type": "multilabel", "values": names, "classes": [classes[i] for i in WITH_ATTRIBUTES]}
    records = []
    for image in truth["images"]:
        annotations = [
            {**entry, "iscrowd": 0, "attributes": {"all": [name for name, so in zip(names, values) if so]}}
            if entry["category_id"] in WITH_ATTRIBUTES
            else {**entry, "iscrowd": 0}
            for entry, values in zip(truth["annotations"], holds)
            if entry["image_id"] == image["id"]
        ]
        sizes = {"height": image["height"], "width": image["width"]}
        described = {"image_id": image["id"], "dataset": "fashion", "tasks": None, **sizes}
        records.append({**described, "annotations": annotations})
    space = LabelSpace(tuple({"name": name} for name in classes), {"attributes": (group,)})
    results = [
        {**row, "attribute_scores": values.astype(float).tolist(), "attribute_scalars": []}
        for row, values in zip(rows, said)
    ]
    found = AttributeEvaluator("attribute", space, records, other_classes=True).metrics(results)
    assert found["AP_iou_f1"].value / 100 == pytest.approx(FASHIONPEDIA[number], abs=1e-12)
    assert found["AP_iou"].value / 100 == pytest.approx(0.3304948613754191, abs=1e-12)


def test_predictions_become_labels_where_they_are_sure() -> None:
    image = {**record(None, None, None, classes=(0, 1, 2)), "vocabularies": {"attributes": {0: 0, 1: 1, 2: 2, 7: 3}}}
    scores = torch.tensor(
        [
            [0.1, 0.8, 0.1, 0.95, 0.05, 0.9, 1.0, 0.0, 0.0],
            [0.4, 0.3, 0.3, 0.95, 0.6, 0.1, 1.0, 0.0, 0.0],
            [0.4, 0.3, 0.3, 0.1, 0.0, 0.4, 1.0, 0.0, 0.0],
        ]
    )
    found = {"classes": torch.tensor([0, 1, 2]), "attribute_scores": scores, "attribute_scalars": torch.zeros(3, 2)}
    labels = target().as_label(image, found, 0.7).annotations
    # The data set has no word for sides; person and tree are never parked; scalars are never sure.
    assert labels[0] == {"attributes": {"colour": "green", "marks": ["rim"]}}
    assert labels[1] == {"attributes": {"parked": False}}
    assert labels[2] == {"attributes": {"marks": []}}
    for entry, label in zip(image["annotations"], labels):
        entry |= label
    assert target().check(image).instances == 3
    image["vocabularies"] = {}
    assert target().as_label(image, found, 0.7).annotations == [None] * 3


def test_drawing_names_what_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[str] = []
    monkeypatch.setattr(Canvas, "note", lambda self, box, text, color: notes.append(text))
    prediction = truth(RECORDS[0])
    prediction["attribute_scores"][0, :3] = torch.tensor([0.3, 0.4, 0.3])
    prediction["attribute_scores"][1, 3:5] = torch.tensor([0.8, 0.51])
    target().draw(Canvas(np.zeros((40, 60, 3), np.uint8)), prediction)
    assert notes == ["dots, age 31", "rim, dots, parked, weight 2"]
