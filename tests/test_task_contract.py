"""What every task must do, over every configs/tasks/*.yaml: a new task costs no new test of this kind."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.structures import Instances
from tiny import available_tasks, tiny_config
from toy import Toy

from mtl_rcnn.data.mapper import Mapper, read_image
from mtl_rcnn.data.target import ImageTarget, Prediction, Sample
from mtl_rcnn.engine.build import build_evaluators, build_model, build_targets, task_classes
from mtl_rcnn.engine.data import train_datasets
from mtl_rcnn.modeling.slots import DetectorTask, ImageTask, RoiTask
from mtl_rcnn.visualize.canvas import Canvas


class Bench:
    """One task on the toy data set, with a detector under it if it works on regions."""

    def __init__(self, name: str, toy: Toy) -> None:
        alone = name == "detection" or not issubclass(task_classes(tiny_config(["detection", name]))[name], RoiTask)
        tasks = [name] if alone else ["detection", name]
        data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]}}"
        self.name = name
        self.cfg = tiny_config(tasks, f"data.train=[{data}]", "data.val=[]", "data.train_augment=null")
        datasets, self.label_space = train_datasets(self.cfg)
        self.records = datasets[0].records
        self.targets = build_targets(self.cfg, self.label_space)
        mapper = Mapper(self.targets, [], training=True)
        self.samples = [mapper(record, index) for index, record in enumerate(self.records)]
        self.kind = task_classes(self.cfg)[name]
        self.model = build_model(self.cfg, self.label_space)
        self.task = next(task for task in self.model.tasks() if task.name == name)

    def without_labels(self, sample: Sample) -> Sample:
        """The sample as a data set gives it that does not label this task."""
        labelled = {**sample["labelled"], self.name: False}
        if issubclass(self.kind, RoiTask):
            kept = {k: v for k, v in sample["instances"].get_fields().items() if k != f"gt_has_{self.name}"}
            return {**sample, "labelled": labelled, "instances": Instances(sample["instances"].image_size, **kept)}
        if issubclass(self.kind, DetectorTask):
            return {**sample, "labelled": labelled, "instances": Instances(sample["instances"].image_size)}
        return {**sample, "labelled": labelled, "targets": {}}

    def losses(self, samples: list[Sample]) -> dict[str, float]:
        """This task's losses after a backward pass, by part."""
        self.model.train().zero_grad(set_to_none=True)
        sums, _ = self.model(samples)
        torch.stack([value for value, _ in sums.values()]).sum().backward()
        return {key.split("/")[1]: value.item() for key, (value, _) in sums.items() if key.startswith(f"{self.name}/")}

    def truth(self, sample: Sample) -> Prediction:
        """The labels of one image as a prediction: rows that carry this task's label only."""
        merged: Prediction = {}
        for target in self.targets.values():
            merged |= target.as_prediction(sample)
        has = f"gt_has_{self.name}"
        if isinstance(self.targets[self.name], ImageTarget) or not sample["instances"].has(has):
            return merged
        return {name: value[sample["instances"].get(has)] for name, value in merged.items()}


@pytest.fixture(params=available_tasks())
def bench(request: pytest.FixtureRequest, toy: Toy) -> Bench:
    return Bench(request.param, toy)


def test_loss_keys_do_not_depend_on_labels(bench: Bench) -> None:
    half = [bench.without_labels(s) if i % 2 else s for i, s in enumerate(bench.samples)]
    for samples in (bench.samples, half, [bench.without_labels(s) for s in bench.samples]):
        losses = bench.losses(samples)
        assert tuple(losses) == bench.kind.loss_parts
        assert all(np.isfinite(value) for value in losses.values())


def test_gradients_reach_every_parameter_of_the_task(bench: Bench) -> None:
    losses = bench.losses(bench.samples)
    assert all(value > 0 for value in losses.values())
    gradients = {name: p.grad for name, p in bench.task.named_parameters() if p.requires_grad}
    assert gradients
    assert all(grad is not None and grad.abs().sum() > 0 for grad in gradients.values())


def test_without_labels_the_loss_is_zero_and_keeps_every_parameter_in_the_graph(bench: Bench) -> None:
    losses = bench.losses([bench.without_labels(s) for s in bench.samples])
    assert set(losses.values()) == {0.0}
    assert all(p.grad is not None and not p.grad.any() for p in bench.task.parameters() if p.requires_grad)


def test_decoding_scripts(bench: Bench) -> None:
    scripted = torch.jit.script(bench.task.eval())
    if issubclass(bench.kind, DetectorTask):
        _check_detector_scripts(bench, scripted)
        return
    if issubclass(bench.kind, ImageTask):
        _check_image_task_scripts(bench, scripted)
        return
    boxes = torch.tensor([[2.0, 3.0, 30.0, 40.0], [10.0, 5.0, 22.5, 60.0]])
    classes = torch.tensor([1, 0])
    with torch.no_grad():
        raw = bench.task(torch.rand(2, 16, bench.task.pooler_resolution, bench.task.pooler_resolution))
        expected = bench.task.decode(raw, boxes, classes, torch.zeros(2, dtype=torch.int64))
        found = scripted.decode(raw, boxes, classes, torch.zeros(2, dtype=torch.int64))
        size, scale = torch.tensor([70, 50]), torch.tensor([1.0, 1.0])
        expected |= bench.task.to_image(expected, boxes, scale, size)
        found |= scripted.to_image(found, boxes, scale, size)
    assert set(found) == set(expected)
    for name, value in expected.items():
        assert torch.equal(found[name], value), name


@torch.no_grad()
def _check_detector_scripts(bench: Bench, scripted: torch.jit.ScriptModule) -> None:
    features = bench.model.backbone(torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
    sizes = torch.tensor([[60, 90], [64, 70]])
    boxes = bench.task.proposals(features, sizes)
    raw = bench.task(torch.rand(sum(map(len, boxes)), 16, bench.task.pooler_resolution, bench.task.pooler_resolution))
    expected = bench.task.decode(raw, boxes, sizes)
    found = scripted.decode(raw, scripted.proposals(features, sizes), sizes)
    assert len(expected["boxes"]) > 0
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@torch.no_grad()
def _check_image_task_scripts(bench: Bench, scripted: torch.jit.ScriptModule) -> None:
    features = bench.model.backbone(torch.rand(2, 3, 64, 96, generator=torch.Generator().manual_seed(1)))
    padded, size, image_size = torch.tensor([64, 96]), torch.tensor([60, 90]), torch.tensor([71, 107])
    expected = bench.task.decode(bench.task(features), padded)
    found = scripted.decode(scripted(features), padded)
    assert expected
    assert all(torch.equal(found[name], value) for name, value in expected.items())
    for index in range(2):
        one = {name: value[index] for name, value in expected.items()}
        expected_image = bench.task.to_image(one, size, image_size)
        found_image = scripted.to_image(one, size, image_size)
        assert set(found_image) == {output.name for output in bench.task.outputs()}
        assert all(torch.equal(found_image[name], value) for name, value in expected_image.items())


def test_evaluator_gives_the_top_score_on_its_own_ground_truth(bench: Bench) -> None:
    evaluator = build_evaluators(bench.cfg, bench.label_space, bench.records)[bench.name]
    rows = [r for record, s in zip(bench.records, bench.samples) for r in evaluator.rows(record, bench.truth(s))]
    headline = evaluator.metrics(rows)[evaluator.headline]
    assert headline.value == pytest.approx(100.0 if headline.higher_is_better else 0.0, abs=1e-4)


def test_evaluator_without_predictions_gives_no_good_score_and_says_why(bench: Bench) -> None:
    evaluator = build_evaluators(bench.cfg, bench.label_space, bench.records)[bench.name]
    headline = evaluator.metrics([])[evaluator.headline]
    assert headline.value == 0.0 if headline.higher_is_better else headline.value > 0
    assert "no detections" in headline.reason or "no predictions" in headline.reason


def test_drawing_changes_the_image(bench: Bench) -> None:
    image = read_image(bench.records[0])
    canvas = Canvas(image, bench.label_space.classes)
    blank = canvas.image.copy()
    bench.targets[bench.name].draw(canvas, bench.truth(bench.samples[0]))
    assert canvas.image.shape == blank.shape
    assert canvas.image.dtype == np.uint8
    assert (canvas.image != blank).any()


def test_outputs_are_what_the_network_predicts(bench: Bench) -> None:
    (prediction,) = bench.model.eval()(bench.samples[:1])
    height, width = bench.samples[0]["height"], bench.samples[0]["width"]
    for output in bench.task.outputs():
        value = prediction[output.name]
        assert str(value.dtype) == f"torch.{output.dtype}"
        sizes = {"N": len(prediction.get("scores", ())), "H": height, "W": width}
        shape = [size.strip() for size in output.shape.strip("()").split(",") if size.strip()]
        assert len(value.shape) == len(shape)
        for side, found in zip(shape, value.shape):
            free = side not in sizes and not side.isdigit()  # a letter of the task's own, such as L lines
            assert free or found == sizes.get(side, int(side) if side.isdigit() else None)
