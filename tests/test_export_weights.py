"""The weights alone as safetensors: they are the checkpoint's, they train, score and predict as it does, and no other
file is taken for them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from networks import images, restored, write_checkpoint
from runs import equal, largest_file
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_train import toy_config
from tiny import LABEL_SPACE, available_tasks, region_tasks, tiny_config, tiny_model
from toy import Toy, write_toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import model_file
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.evaluate import evaluate_checkpoint
from mtl_rcnn.engine.pretrained.load import load_initial_weights
from mtl_rcnn.engine.restore import restore
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.export.export import export_checkpoint
from mtl_rcnn.predict import Predictor

TASKS = tuple(available_tasks())
DESCRIPTION = {"iteration": 3, "label_space": {}, "config": {"model": {}}, "versions": {}}


def export(run: Path, folder: Path, *overrides: str) -> Path:
    """The file that the tool writes."""
    given = [f"run={run}", f"output_dir={folder}", "export.method=safetensors", *overrides]
    export_checkpoint(compose("export", given))
    return folder / "model.safetensors"


@pytest.fixture(scope="module")
def toy_files(tmp_path_factory: pytest.TempPathFactory) -> Toy:
    return write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture(scope="module")
def run(toy_files: Toy, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The last checkpoint of a run with all tasks that averages its weights."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    train(toy_config(toy_files, folder, "solver.ema=0.9", "tasks.detection.score_thresh=0.0"))
    return folder / "model_0000004.pth"


@pytest.fixture(scope="module")
def exported(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(run, tmp_path_factory.mktemp("exported"))


@pytest.mark.parametrize("task", [*TASKS, "all"])
def test_the_library_alone_finds_the_state_dict(task: str, tmp_path: Path) -> None:
    tasks = TASKS if task == "all" else ("detection", task) if task in region_tasks() else (task,)
    checkpoint = write_checkpoint(tmp_path / "network.pth", tuple(dict.fromkeys(tasks)))
    found = load_file(export(checkpoint, tmp_path / "out"))
    expected = checkpoints.load(checkpoint)["model"]
    assert found.keys() == expected.keys() == restore(checkpoint).model.state_dict().keys()
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        assert torch.equal(found[name], value), name


def test_the_average_is_what_is_written_and_the_file_says_what_it_is(run: Path, exported: Path) -> None:
    state = checkpoints.load(run)
    found = load_file(exported)
    assert equal(found, dict(state["ema"]))
    assert not equal(found, dict(state["model"]))
    with safe_open(exported, "pt") as file:
        told = json.loads(file.metadata()["mtl_rcnn"])
    assert told["format"] == model_file.FORMAT
    for part in ("iteration", "label_space", "config", "versions"):
        assert told[part] == state[part]


def test_equal_networks_give_equal_files(run: Path, exported: Path, tmp_path: Path) -> None:
    assert export(run, tmp_path).read_bytes() == exported.read_bytes()
    assert export(exported, tmp_path / "again").read_bytes() == exported.read_bytes()


def test_it_scores_as_its_checkpoint(run: Path, exported: Path, tmp_path: Path) -> None:
    metrics = []
    for path in (run, exported):
        folder = tmp_path / path.stem
        given = [f"run={path}", f"output_dir={folder}", "device=cpu", "workers=0", "pictures=false"]
        metrics.append(evaluate_checkpoint(compose("evaluate", given)))
    assert len(metrics[0]) > len(TASKS)
    first, second = (sorted(folder.rglob("*.json")) for folder in (tmp_path / run.stem, tmp_path / exported.stem))
    assert [path.name for path in first] == [path.name for path in second]
    for mine, other in zip(first, second, strict=True):
        assert mine.read_bytes() == other.read_bytes(), mine.name


def test_it_predicts_as_its_checkpoint(run: Path, exported: Path) -> None:
    results = [list(Predictor(path, device="cpu")(images())) for path in (run, exported)]
    assert sum(len(result.boxes) for result in results[0]) > 0
    for mine, other in zip(*results, strict=True):
        assert equal(mine.outputs, other.outputs)


def test_a_training_starts_from_it_with_everything(
    run: Path, exported: Path, toy_files: Toy, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cfg = toy_config(toy_files, tmp_path / "tuned", "solver.max_iter=1", "solver.steps=[]", "seed=5")
    cfg.checkpoint.weights = str(exported)
    space = restore(run).label_space
    model = build_model(cfg, space)
    with caplog.at_level("INFO", "mtl_rcnn"):
        load_initial_weights(cfg, model, space)
    assert "(mtl_rcnn)" in caplog.text
    assert "starts at random" not in caplog.text
    assert equal(dict(model.state_dict()), dict(checkpoints.load(run)["ema"]))
    assert train(cfg).metrics


def test_a_training_is_told_of_other_classes_and_pixels(exported: Path, tmp_path: Path) -> None:
    cfg = tiny_config(TASKS, f"checkpoint.weights={exported}")
    with pytest.raises(CheckpointError, match=r"its 3 classes are not the 2 of this run"):
        load_initial_weights(cfg, build_model(cfg, LABEL_SPACE), LABEL_SPACE)
    path = export(write_checkpoint(tmp_path / "network.pth", TASKS), tmp_path)
    cfg = tiny_config(TASKS, f"checkpoint.weights={path}", "model.input_format=RGB")
    with pytest.raises(ConfigError, match=r"model\.input_format=BGR"):
        load_initial_weights(cfg, build_model(cfg, LABEL_SPACE), LABEL_SPACE)


@pytest.mark.parametrize("task", TASKS)
def test_a_subset_of_the_tasks_is_a_network_of_its_own(task: str, tmp_path: Path) -> None:
    whole = restored(tmp_path, TASKS)
    kept = sorted({"detection", task} if task in region_tasks() else {task})
    path = export(whole.path, tmp_path / "out", f"export.tasks=[{','.join(kept)}]")
    part = restore(path)
    assert sorted(part.cfg.tasks) == kept
    assert part.model.state_dict().keys() < whole.model.state_dict().keys() or len(TASKS) == len(kept)
    results = [list(Predictor(path, device="cpu", tasks=[task])(images())) for path in (whole.path, path)]
    for mine, other in zip(*results, strict=True):
        assert equal(mine.outputs, other.outputs)


def test_shared_and_strided_tensors_are_written_whole(tmp_path: Path) -> None:
    base = torch.arange(24.0).reshape(2, 3, 2, 2)
    weights = {
        "own": base,
        "tied": base,
        "row": base[1],
        "turned": base.permute(0, 2, 3, 1),
        "channels_last": base.to(memory_format=torch.channels_last),
        "expanded": torch.ones(1).expand(3),
        "number": torch.tensor(7),
        "half": base.bfloat16(),
        "flag": torch.tensor([True, False]),
        "empty": torch.zeros(0, 3),
    }
    model_file.save(tmp_path / "model.safetensors", weights, DESCRIPTION)
    found = model_file.load(tmp_path / "model.safetensors")
    assert found.pop("model").keys() == weights.keys()
    assert found == {**DESCRIPTION, "ema": None}
    for name, value in load_file(tmp_path / "model.safetensors").items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name]), name


def test_a_network_in_channels_last_gives_the_file_of_the_same_network(tmp_path: Path) -> None:
    plain = tiny_model(("detection",))
    last = tiny_model(("detection",)).to(memory_format=torch.channels_last)
    assert any(not value.is_contiguous() for value in last.state_dict().values())
    for name, model in (("plain", plain), ("last", last)):
        model_file.save(tmp_path / name, model.state_dict(), DESCRIPTION)
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "last").read_bytes()


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-7])


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-3] ^= 4
    path.write_bytes(content)


def _retell(old: bytes, new: bytes) -> Callable[[Path], None]:
    """Writes other words of the same length into the metadata."""

    def spoil(path: Path) -> None:
        content = path.read_bytes()
        assert len(old) == len(new)
        assert old in content
        path.write_bytes(content.replace(old, new))

    return spoil


DAMAGE = {
    "cut": (_cut, r"not a readable safetensors file, truncated"),
    "empty": (lambda path: path.write_bytes(b""), r"not a readable safetensors file"),
    "flipped bit": (_flip, r"damaged \(its checksum is wrong\)"),
    "other iteration": (_retell(rb"\"iteration\": 3", rb"\"iteration\": 7"), r"damaged \(its checksum is wrong\)"),
    "other format": (_retell(rb"\"format\": 1", rb"\"format\": 8"), r"has format 8, this version of mtl_rcnn reads 1"),
    "no description": (_retell(rb"\"format\": 1", rb"\"former\": 1"), r"no description of a network"),
    "no JSON": (_retell(rb"\"format\": 1", rb"\"format\"; 1"), r"no description of a network"),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_what_is_no_such_file_is_one_error(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model_file.save(path, {"w": torch.arange(1.0, 9.0)}, DESCRIPTION)
    spoil, said = DAMAGE[kind]
    spoil(path)
    cfg = tiny_config(TASKS, f"checkpoint.weights={path}")
    for use in (
        lambda: restore(path),
        lambda: Predictor(path),
        lambda: load_initial_weights(cfg, tiny_model(TASKS), LABEL_SPACE),
    ):
        with pytest.raises(CheckpointError, match=said):
            use()


def test_somebody_elses_file_is_no_network_but_may_be_weights(tmp_path: Path) -> None:
    path = tmp_path / "theirs.safetensors"
    save_file({"w": torch.ones(2)}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"theirs.*not a network of mtl_rcnn .*checkpoint\.weights="):
        restore(path)
    with pytest.raises(CheckpointError, match="no such file"):
        restore(tmp_path / "none.safetensors")
    cfg = tiny_config(TASKS, f"checkpoint.weights={path}")
    with pytest.raises(CheckpointError, match="names of no known layout"):
        load_initial_weights(cfg, tiny_model(TASKS), LABEL_SPACE)


def test_wrong_settings_are_told_before_anything_is_loaded() -> None:
    with pytest.raises(
        ConfigError, match=r"export\.method=safetensor: expected trace or script or onnx or safetensors"
    ):
        compose("export", ["run=x", "export.method=safetensor"])
    with pytest.raises(ConfigError, match=r"export\.tasks=detection: expected null or a list of names"):
        compose("export", ["run=x", "export.tasks=detection"])
    with pytest.raises(ConfigError, match=r"checkpoint\.resume=model\.safetensors.*checkpoint\.weights"):
        tiny_config(TASKS, "checkpoint.resume=model.safetensors")


def test_the_file_that_is_read_is_not_overwritten(exported: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(exported.read_bytes())
    with pytest.raises(ConfigError, match="is the network to export; choose another"):
        export_checkpoint(compose("export", [f"run={path}", "export.method=safetensors"]))
    assert path.read_bytes() == exported.read_bytes()


def test_what_the_disk_does_not_take_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    model_file.save(path, {"w": torch.ones(2)}, DESCRIPTION)
    before = path.read_bytes()
    with largest_file(2000), pytest.raises(CheckpointError, match=r"cannot be written \(.*bytes are free\)"):
        model_file.save(path, {"w": torch.ones(1000)}, DESCRIPTION)
    assert path.read_bytes() == before
    assert [entry.name for entry in tmp_path.iterdir()] == ["model.safetensors"]
