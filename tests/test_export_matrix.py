"""Every way to export, every set of tasks, batches, sizes and nothing found: files against the network itself."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest
import torch
from elsewhere import Elsewhere, fetch, send
from reference import randomise_statistics
from tiny import LABEL_SPACE, available_tasks, make_sample, need_tasks, tiny_model
from torch import Tensor, nn

from mtl_rcnn.data.target import Prediction
from mtl_rcnn.errors import ConfigError, ExportError
from mtl_rcnn.export.certificate import Case, certify, one_by_one
from mtl_rcnn.export.devices import fixed_devices
from mtl_rcnn.export.scripting import script_network
from mtl_rcnn.export.torchscript import TracedNetwork, _trace, export_torchscript
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.runtime import ExportedNetwork

PREPROCESSING = {"short_edge": None, "max_size": None, "channel_order": "RGB"}
TASK_SETS = [("detection",), ("detection", "mask"), ("detection", "keypoint"), tuple(available_tasks())]
SIZES = [(64, 96), (96, 64), (100, 130)]
ORIGINAL = [torch.tensor([70, 90]), torch.tensor([200, 133]), torch.tensor([50, 130])]


@pytest.fixture(scope="module")
def images() -> list[Tensor]:
    return [make_sample(i, size, 0)["image"] for i, size in enumerate(SIZES)]


@pytest.fixture(scope="module")
def model(images: list[Tensor]) -> MultiTaskRCNN:
    """Random, with a threshold between its best score on a plain image and on noise."""
    model = tiny_model(available_tasks(), "tasks.detection.score_thresh=0.0", "tasks.detection.detections_per_image=30")
    randomise_statistics(model, seed=4)
    model.eval()

    def best(batch: list[Tensor]) -> list[float]:
        return [float(p["scores"].max()) for p in model.predict_tensors(batch, [torch.tensor([64, 96])] * len(batch))]

    plain = max(best([nothing()])[0], best([images[1], nothing(), images[0], images[2]])[1])
    assert min(best(images)) > plain, "choose another seed"
    model.roi_heads.detector.score_thresh = plain + 1e-4
    return model


def nothing() -> Tensor:
    """An image on which the network finds nothing."""
    return torch.full((3, *SIZES[0]), 114, dtype=torch.uint8)


def exported(method: str, model: MultiTaskRCNN, tasks: Sequence[str], image: Tensor) -> torch.jit.ScriptModule:
    """The file, read back."""
    if method == "trace":
        module = _trace(TracedNetwork(model, tasks), Case("", [image], [ORIGINAL[0]]))
    else:
        module = script_network(model, InferenceNetwork(model, tasks))
    file = io.BytesIO()
    torch.jit.save(module, file)
    file.seek(0)
    return torch.jit.load(file)


@pytest.mark.parametrize("method", ["trace", "script"])
@pytest.mark.parametrize("tasks", TASK_SETS, ids="+".join)
def test_every_export_predicts_what_the_network_does(
    method: str, tasks: tuple[str, ...], model: MultiTaskRCNN, images: list[Tensor]
) -> None:
    need_tasks(*tasks)
    module = exported(method, model, tasks, images[0])
    names = TracedNetwork(model, tasks).names
    batches = [([image], [size]) for image, size in zip(images, ORIGINAL)] + [([nothing()], [ORIGINAL[0]])]
    if method == "script":
        batches += [(images, ORIGINAL), ([images[1], nothing(), images[0], images[2]], [*ORIGINAL, ORIGINAL[0]])]
    cases = [Case(f"batch {index}", *batch) for index, batch in enumerate(batches)]

    def eager(images: list[Tensor], sizes: list[Tensor]) -> list[Prediction]:
        return [{name: p[name] for name in names} for p in model.predict_tensors(images, sizes)]

    report = certify(eager, one_by_one(names, module) if method == "trace" else module, cases)
    rows = [case["rows"] for case in report]
    assert max(max(row) for row in rows) > 20
    assert rows[3] == [0]
    if method == "script":
        assert min(rows[4]) > 0
        assert rows[5][1] == 0
        assert set(module(images[:1], ORIGINAL[:1])[0]) == set(names)
    kept = sum(
        p.numel() for name, part in model.parts().items() if name in ("trunk", *tasks) for p in part.parameters()
    )
    assert sum(p.numel() for p in module.parameters()) == kept
    assert fixed_devices(module) == []


@pytest.mark.parametrize("method", ["trace", "script"])
def test_a_file_runs_where_it_is_moved(method: str, model: MultiTaskRCNN, images: list[Tensor]) -> None:
    module = exported(method, model, available_tasks(), images[0])
    inputs = (images[0], ORIGINAL[0]) if method == "trace" else (images, ORIGINAL)
    with torch.no_grad(), torch.jit.optimized_execution(False):
        expected = module(*inputs)
        for part in module.modules():
            for name, value in [*part.named_parameters(recurse=False), *part.named_buffers(recurse=False)]:
                setattr(part, name, send(value.detach()))
        with Elsewhere():
            found = fetch(module(*inputs))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


@pytest.mark.parametrize("method", ["trace", "script"])
def test_a_file_written_on_the_cpu_runs_on_a_gpu(method: str, model: MultiTaskRCNN, images: list[Tensor]) -> None:
    if not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    module = exported(method, model, available_tasks(), images[0])
    inputs = (images[0], ORIGINAL[0]) if method == "trace" else (images, ORIGINAL)
    with torch.no_grad():
        expected, found = module(*inputs), module.to("cuda")(*inputs)
    first, moved = (expected[0], found[0]) if method == "trace" else (expected[0]["boxes"], found[0]["boxes"])
    assert moved.device.type == "cuda"
    torch.testing.assert_close(moved.cpu(), first, rtol=0, atol=1e-2)  # another device rounds otherwise


class Stubborn(nn.Module):
    """Makes tensors where its author's machine had them, in three ways."""

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.zeros(3) + torch.arange(3, device="cpu") + (x * 2).to("cpu")


def test_devices_in_a_graph_are_found() -> None:
    for module in (torch.jit.trace(Stubborn(), torch.rand(3)), torch.jit.script(Stubborn())):
        found = fixed_devices(module)
        assert any("aten::arange" in place for place in found), found
        assert any("aten::zeros" in place for place in found), found
        assert any("aten::to" in place for place in found), found
        with Elsewhere() as there, pytest.raises(RuntimeError):
            module(send(torch.rand(3)))
        assert there.mixed == ["aten::add.Tensor"]


class Unscriptable(nn.Module):
    """A head that TorchScript cannot compile."""

    def forward(self, pooled: Tensor) -> Tensor:
        return pooled.mean(dim=sorted({2, 3}))


@pytest.fixture
def unscriptable(model: MultiTaskRCNN) -> Iterator[str]:
    """Name of a RoI task whose head is spoilt for the test."""
    name, task = next(iter(model.roi_heads.tasks.items()), ("", None))
    if task is None:
        pytest.skip("this copy of the project has no RoI task")
    head, task.head = task.head, Unscriptable()
    yield name
    task.head = head


def test_a_head_that_cannot_be_scripted_is_named(unscriptable: str, model: MultiTaskRCNN) -> None:
    with pytest.raises(ExportError) as refused:
        script_network(model, InferenceNetwork(model))
    said = str(refused.value)
    assert f"{unscriptable} cannot be scripted" in said
    assert "Set aren't supported at `return pooled.mean(dim=sorted({2, 3}))`" in said
    lines = Path(__file__).read_text().splitlines()
    line = next(number for number, text in enumerate(lines, 1) if "sorted({2, 3}))" in text)
    assert f"test_export_matrix.py:{line}" in said
    others = ",".join(name for name in InferenceNetwork(model).names if name != unscriptable)
    assert said.endswith(f"use export.method=trace or leave it out: export.tasks=[{others}]")
    assert "\n" not in said
    script_network(model, InferenceNetwork(model, others.split(",")))


def test_tasks_that_the_network_lacks_are_refused(model: MultiTaskRCNN) -> None:
    detector, *others = InferenceNetwork(model).names
    for names in (["nonesuch"], []):
        with pytest.raises(ConfigError, match=f"expected some of the network's tasks, which are {detector}"):
            InferenceNetwork(model, names)
    if others:
        with pytest.raises(ConfigError, match=f"{others[0]} work on boxes; add {detector}"):
            InferenceNetwork(model, others[:1])


@pytest.mark.parametrize("method", ["trace", "script"])
def test_runtime_runs_both_kinds(method: str, model: MultiTaskRCNN, images: list[Tensor], tmp_path: Path) -> None:
    arguments = (model, LABEL_SPACE, images, tmp_path, PREPROCESSING, {}, 20 if method == "script" else 3, method)
    manifest = export_torchscript(*arguments)
    assert manifest["method"] == method
    batched = {case["case"]: len(case["rows"]) for case in manifest["certificate"]}
    assert max(batched.values()) == (3 if method == "script" else 1)
    network = ExportedNetwork(tmp_path)
    sizes = [torch.tensor(image.shape[-2:]) for image in images]
    together = model.predict_tensors(images, sizes)
    alone = [model.predict_tensors([image], [size])[0] for image, size in zip(images, sizes)]
    torch.testing.assert_close([network(image) for image in images], alone, rtol=0, atol=1e-4)
    torch.testing.assert_close(network.batch(images), together if method == "script" else alone, rtol=0, atol=1e-4)
    assert network.batch([]) == []


def test_an_unknown_method_is_refused(model: MultiTaskRCNN, images: list[Tensor], tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"export\.method=onyx: expected one of trace, script"):
        export_torchscript(model, LABEL_SPACE, images, tmp_path, PREPROCESSING, {}, 0, "onyx")
