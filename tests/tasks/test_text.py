"""What is particular to text: its labels, what is drawn of them, losses, ends, views, files, exports."""

from __future__ import annotations

import io
import math
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from reference import randomise_statistics
from tiny import make_sample, tiny_config, tiny_model
from toy import Toy

from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.engine.build import build_evaluators, build_targets
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.quadrilaterals import corners, iou
from mtl_rcnn.export.certificate import Case, certify, one_by_one
from mtl_rcnn.export.devices import fixed_devices
from mtl_rcnn.export.scripting import script_network
from mtl_rcnn.export.torchscript import TracedNetwork, trace_network
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.row_lstm import RowLSTM
from mtl_rcnn.modeling.slots import DecodedView
from mtl_rcnn.modeling.strips import grid_strips
from mtl_rcnn.tasks.text import Lines, TextEvaluator, TextTarget, TextTask

SPACE = LabelSpace(())
TARGET = TextTarget("text", SPACE)
FEATURES = {"p3": ShapeSpec(channels=6, stride=8), "p4": ShapeSpec(channels=6, stride=16)}
HORIZONTAL, ORIENTED = [20.0, 14, 150, 14, 150, 40, 20, 40], [30.0, 60, 170, 88, 164, 118, 24, 90]


def record(lines: Any = None, tasks: tuple[str, ...] | None = None) -> dict[str, Any]:
    image = {"dataset": "toy", "image_id": 3, "height": 128, "width": 192, "tasks": tasks, "file_name": "a/img_3.jpg"}
    return image if lines is None else {**image, "text_lines": lines}


def line(polygon: list[float], **fields: Any) -> dict[str, Any]:
    return {"polygon": polygon, **fields}


def task(*overrides: str, features: dict[str, ShapeSpec] = FEATURES) -> TextTask:
    knobs = dict(tiny_config(["text"], *overrides).tasks.text)
    for section in ("_target_", "target", "evaluator"):
        knobs.pop(section)
    torch.manual_seed(0)
    return TextTask("text", SPACE, features, **knobs)


def loaded(*polygons: list[float], ignore: tuple[int, ...] = ()) -> Lines:
    lines = [line(polygon, ignore=index in ignore) for index, polygon in enumerate(polygons)]
    label = TARGET.load(record(lines), Geometry.identity(128, 192))
    assert label is not None
    return label


def true_raw(task: TextTask, label: Lines) -> torch.Tensor:
    """(1, 8, 12, k, 5): what a network would say that knows the label."""
    raw = torch.zeros(1, 8, 12, len(task.heights), task.values)
    task.per_image = 10**6
    task.positive_fraction = 1.0
    found = task._label(grid_strips(raw, task.heights, task.stride), raw, label, (128, 192))
    flat = raw.view(-1, task.values)
    flat[:, 1] = torch.where(found.labels == 1, 9.0, -9.0)
    flat[:, 2:4] = found.vertical
    if task.side_refinement:
        flat[:, 4] = found.side
    return raw


# Labels


def test_what_is_labelled() -> None:
    lines = [line(HORIZONTAL), line(ORIENTED, ignore=True)]
    assert TARGET.check(record(lines)).instances == 1
    assert TARGET.check(record(lines)).image
    assert TARGET.check(record([])).image
    assert not TARGET.check(record()).image
    assert not TARGET.check(record(lines, tasks=("other",))).image
    plain = Geometry.identity(128, 192)
    assert TARGET.load(record(), plain) is None
    assert TARGET.load(record(lines, tasks=()), plain) is None
    empty = TARGET.load(record([]), plain)
    assert empty is not None
    assert empty.quads.shape == (0, 4, 2)


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ([line([1, 2, 3, 4, 5, 6])], "line 0 of 'text_lines': its polygon is [1, 2, 3, 4, 5, 6]; expected 8 numbers"),
        ([line(HORIZONTAL), line([1, 2, 3, float("nan"), 5, 6, 7, 8])], "line 1 of 'text_lines': its polygon [1, 2, 3"),
        ([line([300.0, 5, 330, 5, 330, 9, 300, 9])], "lies outside the image of 192 x 128 pixels"),
        ([line([5.0, 5, 1e6, 5, 30, 9, 5, 9])], "from (5, 5) to (1e+06, 9), reaches far beyond the image of 192"),
        ([line(["a"] * 8)], "not finite"),
        ([7], "line 0 of 'text_lines': is 7; expected an object with a 'polygon'"),
        ([HORIZONTAL], "line 0 of 'text_lines': is ["),
        ({}, "'text_lines' is {}; expected a list"),
    ],
)
def test_faults_are_named(lines: Any, said: str) -> None:
    with pytest.raises(DataError) as refused:
        TARGET.check(record(lines))
    assert "dataset 'toy', image 3" in str(refused.value)
    assert said in str(refused.value)


def test_declared_and_missing() -> None:
    with pytest.raises(DataError, match="has no 'text_lines', but the dataset declares the task 'text'"):
        TARGET.check(record(tasks=("text",)))


def test_a_line_without_area_is_doubtful_and_ignored() -> None:
    flat = [line([5.0, 5, 20, 5, 40, 5, 30, 5])]
    assert [fault.fatal for fault in TARGET.faults(record(flat))] == [False]
    TARGET.check(record(flat))
    assert TARGET.load(record(flat), Geometry.identity(128, 192)).ignored.tolist() == [True]


def test_a_mirror_keeps_corners_upright_and_a_crop_ignores_what_is_mostly_gone() -> None:
    mirrored = TARGET.load(record([line(ORIENTED)]), Geometry(T.TransformList([T.HFlipTransform(192)]), 128, 192))
    np.testing.assert_allclose(mirrored.quads[0].reshape(-1), [22, 88, 162, 60, 168, 90, 28, 118])
    crop = Geometry(T.TransformList([T.CropTransform(100, 0, 92, 128)]), 128, 92)
    label = TARGET.load(record([line(HORIZONTAL), line([110.0, 5, 150, 5, 150, 20, 110, 20])]), crop)
    assert label.ignored.tolist() == [True, False]  # 50 of 130 pixels are left of the first


def test_predictions_become_labels() -> None:
    found = {"text_polygons": torch.tensor([HORIZONTAL, ORIENTED]), "text_scores": torch.tensor([0.95, 0.8])}
    written = TARGET.as_label(record(), found, 0.9)
    again = TARGET.load({**record(), **written.image}, Geometry.identity(128, 192))
    assert again.ignored.tolist() == [False, True]
    np.testing.assert_allclose(again.quads.reshape(2, 8), [HORIZONTAL, ORIENTED])


# Sampling


def test_draws_are_a_function_of_seed_and_sample(toy: Toy) -> None:
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    cfg = tiny_config(["text"], f"data.train=[{data}]", "data.val=[]")
    (dataset,), space = train_datasets(cfg)
    targets = build_targets(cfg, space)

    def draw(seed: int, index: int) -> int:
        return Mapper(targets, [], seed=seed)(dataset.records[0], index)["targets"]["text"].draw

    state = torch.get_rng_state()
    assert draw(0, 5) == draw(0, 5)
    assert len({draw(0, 5), draw(0, 6), draw(1, 5)}) == 3
    assert torch.equal(torch.get_rng_state(), state)


def test_as_many_negatives_as_positives_and_more_where_these_are_few() -> None:
    subject = task("tasks.text.strips.per_image=20")
    raw = torch.zeros(1, 8, 12, 10, 5)
    anchors = grid_strips(raw, subject.heights, 16)
    label = loaded(HORIZONTAL, ORIENTED)
    found = subject._label(anchors, raw, label, (128, 192)).labels
    assert (int((found == 1).sum()), int((found == 0).sum())) == (10, 10)
    again = subject._label(anchors, raw, label, (128, 192)).labels
    assert torch.equal(found, again)
    other = subject._label(anchors, raw, Lines(label.quads, label.ignored, label.draw + 1), (128, 192)).labels
    assert not torch.equal(found, other)
    few = subject._label(anchors, raw, loaded([4.0, 4, 20, 4, 20, 20, 4, 20]), (128, 192)).labels
    positives = int((few == 1).sum())
    assert 0 < positives < 10
    assert int((few == 0).sum()) == 20 - positives


# Losses


def test_losses_are_sums_over_drawn_and_valid_anchors() -> None:
    subject = task()
    label = loaded(HORIZONTAL, ORIENTED)
    losses = subject.losses(torch.zeros(1, 8, 12, 10, 5), [label], [(128, 192)])
    assert losses["cls"][1] == 128
    assert losses["cls"][0].item() == pytest.approx(128 * math.log(2), rel=1e-5)
    assert losses["vertical"][1] > losses["side"][1] > 0
    twice = subject.losses(torch.zeros(2, 8, 12, 10, 5), [label, label], [(128, 192)] * 2)
    assert all(twice[part][0].item() == pytest.approx(2 * losses[part][0].item()) for part in losses)
    right = subject.losses(true_raw(subject, label), [label], [(128, 192)])
    assert right["cls"][0] < 0.2
    assert right["vertical"][0] == right["side"][0] == 0


def test_ignored_lines_are_no_background() -> None:
    subject = task("tasks.text.strips.per_image=100000")
    raw = torch.zeros(1, 8, 12, 10, 5)
    anchors = grid_strips(raw, subject.heights, 16)
    seen, ignored = (
        subject._label(anchors, raw, loaded(HORIZONTAL, ignore=which), (128, 192)).labels for which in ((), (0,))
    )
    assert (seen == 1).any()
    assert not (ignored == 1).any()
    assert (ignored[seen == 1] == -1).all()
    assert ((ignored == 0) <= (seen == 0)).all()


@pytest.mark.parametrize("knob", ["recurrence", "side_refinement"])
def test_without_a_part_every_parameter_learns(knob: str) -> None:
    subject = task(f"tasks.text.{knob}=false")
    raw = subject({"p4": torch.rand(1, 6, 8, 12)})
    losses = subject.losses(raw, [loaded(HORIZONTAL, ORIENTED)], [(128, 192)])
    assert tuple(losses) == subject.loss_parts
    assert subject.loss_parts == (("cls", "vertical") if knob == "side_refinement" else ("cls", "vertical", "side"))
    sum(value for value, _ in losses.values()).backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in subject.parameters())
    assert (any(isinstance(part, RowLSTM) for part in subject.modules())) == (knob != "recurrence")
    decoded = subject.decode(raw, torch.tensor([128, 192]))
    assert decoded["text_strips"].shape == (1, 960, 5)


def test_the_recurrence_is_torchs_along_rows() -> None:
    torch.manual_seed(0)
    rows = RowLSTM(6, 4)
    x = torch.rand(2, 6, 3, 5)
    for image in range(2):
        for row in range(3):
            expected = rows.lstm(x[image, :, row].T)[0].T
            torch.testing.assert_close(rows(x)[image, :, row], expected, rtol=0, atol=1e-6)


# Decoding


@pytest.mark.parametrize("level", ["p3", "p4"])
def test_labels_decode_to_the_lines_they_come_from(level: str) -> None:
    subject = task(f"tasks.text.level={level}")
    label = loaded(HORIZONTAL, ORIENTED, [100.0, 118, 180, 118, 180, 126, 100, 126], ignore=(2,))
    raw = torch.zeros(1, 128 // subject.stride, 192 // subject.stride, 10, 5)
    subject.per_image, subject.positive_fraction = 10**6, 1.0
    found = subject._label(grid_strips(raw, subject.heights, subject.stride), raw, label, (128, 192))
    flat = raw.view(-1, 5)
    flat[:, 1] = torch.where(found.labels == 1, 9.0, -9.0)
    flat[:, 2:4], flat[:, 4] = found.vertical, found.side
    decoded = subject.decode(raw, torch.tensor([128, 192]))
    lines = subject.to_image({k: v[0] for k, v in decoded.items()}, torch.tensor([128, 192]), torch.tensor([256, 384]))
    polygons = sorted(lines["text_polygons"].tolist(), key=lambda polygon: polygon[1])
    assert len(polygons) == 2
    for polygon, truth in zip(polygons, (HORIZONTAL, ORIENTED)):
        np.testing.assert_allclose(np.array(polygon) / 2, truth, atol=0.7)
        assert iou(corners(polygon), 2 * corners(truth)) > 0.97
    assert lines["text_scores"].min() > 0.99


def test_without_refinement_lines_end_with_their_columns() -> None:
    subject = task("tasks.text.side_refinement=false")
    decoded = subject.decode(true_raw(subject, loaded(HORIZONTAL)), torch.tensor([128, 192]))
    size = torch.tensor([128, 192])
    (polygon,) = subject.to_image({k: v[0] for k, v in decoded.items()}, size, size)["text_polygons"].tolist()
    np.testing.assert_allclose(polygon, [16, 14, 144, 14, 144, 40, 16, 40], atol=1e-2)


def test_views_are_merged_as_lines_and_mirrored_ones_left_out() -> None:
    subject = task()
    size = torch.tensor([128, 192])
    strips = [subject.decode(true_raw(subject, loaded(*p)), size) for p in ((HORIZONTAL,), (HORIZONTAL, ORIENTED))]
    views = [DecodedView({k: v[0] for k, v in each.items()}, size, False) for each in strips]
    merged = subject.merge_views(views, size)
    assert len(merged["text_polygons"]) == 2
    views[1].mirrored = True
    assert len(subject.merge_views(views, size)["text_polygons"]) == 1
    alone = subject.to_image(views[0].decoded, size, size)
    assert all(torch.equal(alone[name], value) for name, value in subject.merge_views(views[:1], size).items())


def test_knobs_are_checked() -> None:
    with pytest.raises(ConfigError, match=r"tasks\.text\.level=p9: the trunk has p3, p4"):
        task("tasks.text.level=p9")
    with pytest.raises(ConfigError, match="expected heights above 0"):
        task("tasks.text.anchor_heights=[11,-3]")


# Exports


def test_files_find_the_lines_that_the_network_finds() -> None:
    lines = [f"tasks.text.lines.{knob}" for knob in ("score_thresh=0.3", "line_score_thresh=0.3", "min_aspect=0.2")]
    model = tiny_model(["text"], *lines, "tasks.text.anchor_heights=[11,16,23,33]")
    randomise_statistics(model, seed=4)
    with torch.no_grad():
        model.eval().image_tasks["text"].predictor.weight.mul_(30)
    shapes = [(64, 96), (96, 64), (100, 130), (256, 200)]
    images = [make_sample(index, shape, 0)["image"] for index, shape in enumerate(shapes)]
    sizes = [torch.tensor([70, 90]), torch.tensor([200, 133]), torch.tensor([50, 130]), torch.tensor([256, 200])]
    single = [Case(f"{index}", [image], [size]) for index, (image, size) in enumerate(zip(images, sizes))]
    traced = trace_network(TracedNetwork(model, None), single[0])
    scripted = script_network(model, InferenceNetwork(model))
    for module, cases in ((traced, single), (scripted, [*single, Case("all", images, sizes)])):
        file = io.BytesIO()
        torch.jit.save(module, file)
        file.seek(0)
        read = torch.jit.load(file)
        found = one_by_one(["text_polygons", "text_scores"], read) if module is traced else read
        report = certify(model.predict_tensors, found, cases)
        rows = [case["rows"][0] for case in report[:4]]
        assert max(rows) > 10
        assert min(rows) == 0
        assert fixed_devices(read) == []


# Evaluation


def test_rows_metrics_and_files(toy: Toy) -> None:
    records = [
        record([line(HORIZONTAL), line(ORIENTED, ignore=True)]),
        {**record(), "image_id": 4, "file_name": "a/img_4.jpg"},
        {**record([line(ORIENTED)]), "image_id": 5, "file_name": "a/img_5.jpg"},
    ]
    evaluator = TextEvaluator("text", SPACE, records)

    def rows_of(image: int, *polygons: list[float]) -> list[dict[str, Any]]:
        found = {"text_polygons": torch.tensor(polygons).reshape(-1, 8), "text_scores": torch.ones(len(polygons))}
        return evaluator.rows(records[image], found)

    rows = rows_of(0, HORIZONTAL, ORIENTED) + rows_of(1, HORIZONTAL) + rows_of(2, HORIZONTAL)
    metrics = evaluator.metrics(rows)
    # Of two lines one is found; of two detections one is right: image 4 is not labelled, ORIENTED in 3 not cared for.
    names = ("hmean", "precision", "recall")
    both = [*names, *(f"deteval_{name}" for name in names)]
    assert {name: metric.value for name, metric in metrics.items()} == dict.fromkeys(both, 50.0)
    assert set(evaluator.files(rows)) == {"_icdar2015.zip", "_icdar2013.zip"}
    assert evaluator.metrics([])["hmean"].reason == "no predictions"
    nothing = TextEvaluator("text", SPACE, records[1:2]).metrics([])
    assert (nothing["hmean"].value, nothing["hmean"].reason) == (0.0, "no lines to be found")
    with pytest.raises(DataError, match=r"row 1: polygon is \[1, 2\]; expected 8 finite numbers"):
        evaluator.metrics([rows[0], {"image_id": 3, "polygon": [1, 2]}])


def test_files_are_written_beside_the_rows(toy: Toy, tmp_path: Any) -> None:
    from mtl_rcnn.evaluation.results import write_predictions

    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
    cfg = tiny_config(["text"], f"data.train=[{data}]", "data.val=[]")
    (dataset,), space = train_datasets(cfg)
    evaluator = build_evaluators(cfg, space, dataset.records)["text"]
    path = write_predictions(tmp_path, "toy", "text", [], evaluator.files([]))
    assert sorted(file.name for file in path.parent.iterdir()) == [
        *("toy_text.json", "toy_text_icdar2013.zip", "toy_text_icdar2015.zip")
    ]
