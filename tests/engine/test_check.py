"""The check of the data: every planted fault is found where it is, nothing is invented, and repaired data is clean."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from functools import cache, partial
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from planted import PLANTS, Found, plant_in_coco, spoilt
from tiny import NETWORK, TASKS, need_tasks
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine.check import CheckReport, check

ROOT = Path(__file__).resolve().parents[2]
ALL = ("detection", "mask", "keypoint")


@pytest.fixture(autouse=True)
def all_tasks() -> None:
    need_tasks(*ALL)


@cache
def _composed() -> DictConfig:
    """Composing takes longer than a check of six images."""
    knobs = [knob for task in ALL for knob in TASKS[task]]
    return compose("check", [f"tasks=[{','.join(ALL)}]", "data.root=unused", *NETWORK, *knobs])


def check_config(data: list[str], folder: Path, *overrides: str) -> DictConfig:
    """A check of tiny networks' data, without a dry run."""
    fixed = [f"output_dir={folder}", "data.workers=2", "device=cpu", "dry_run=false", "data.val=[]"]
    small = ["data.train_augment.resize.short_edge_length=[48]", "data.test_augment.resize.short_edge_length=48"]
    return OmegaConf.merge(_composed(), OmegaConf.from_dotlist([*fixed, *small, *data, *overrides]))


def toy_data(toy: Toy, **extra: str) -> list[str]:
    more = "".join(f", {key}: {value}" for key, value in extra.items())
    return [f"data.train=[{{name: toy, images: {toy.images}, annotations: [{toy.boxes}, {toy.points}]{more}}}]"]


def found_by(report: CheckReport) -> list[Found]:
    rows = [fault for source in report.sources for fault in source.faults]
    return sorted(((f.kind, Path(f.file).name, f.image_id, f.annotation_id) for f in rows), key=str)


def test_clean_data_has_no_fault(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check(check_config([*toy_data(toy), "data.val=${data.train}"], tmp_path))
    assert report.clean
    assert found_by(report) == []
    assert [source.splits for source in report.sources] == ["train, val"], "a dataset is read once"
    said = capsys.readouterr().out
    assert "toy (train, val): 6 images, no fault" in said
    assert said.endswith("no fault found\n")
    written = json.loads((tmp_path / "check" / "faults.json").read_text())
    assert written["clean"] is True
    assert written["coverage"][0] == {
        "dataset": "toy",
        "task": "detection",
        "images_labelled": 6,
        "images": 6,
        "instances_labelled": 9,
        "instances": 9,
    }
    for name in ("toy_classes.png", "toy_sizes.png"):
        assert (tmp_path / "check" / name).read_bytes()[:4] == b"\x89PNG"


@pytest.mark.parametrize("name", PLANTS)
def test_a_planted_fault_is_found_and_no_other_and_repaired(name: str, toy: Toy, tmp_path: Path) -> None:
    spoilt(toy, PLANTS[name])
    fixed = tmp_path / "fixed"
    report = check(check_config(toy_data(toy), tmp_path / "run", f"fix_dir={fixed}"))
    assert found_by(report) == sorted(PLANTS[name].found, key=str)
    assert all(fault.repair is not None for source in report.sources for fault in source.faults)
    assert not report.clean
    data = [f"data.train=[{{name: toy, images: {toy.images}, annotations: {fixed / 'toy.json'}}}]"]
    again = check(check_config(data, tmp_path / "again"))
    assert found_by(again) == []
    assert again.clean


def test_many_faults_at_once_are_all_listed(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    names = ("image truncated", "directory for image", "NaN box", "polygon of odd length", "too few keypoints",
             "count of keypoints", "box half outside", "crowd's mask of another size")  # fmt: skip
    spoilt(toy, *(PLANTS[name] for name in names))
    report = check(check_config(toy_data(toy), tmp_path))
    assert found_by(report) == sorted((found for name in names for found in PLANTS[name].found), key=str)
    said = capsys.readouterr().out
    listed = json.loads((tmp_path / "check" / "faults.json").read_text())
    assert len(listed["faults"]) == len(names)
    for fault in listed["faults"]:
        assert fault["message"] in said
        assert fault["file"] in said
        assert str(fault["image_id"]) in fault["message"]
        assert fault["repair"]
    assert "8 faults in the data" in said
    assert not list(tmp_path.glob("**/toy.json")), "nothing is repaired unless asked for"


def test_labels_that_are_declared_and_missing(toy: Toy, tmp_path: Path) -> None:
    report = check(check_config(toy_data(toy, tasks="[detection, mask]"), tmp_path, f"fix_dir={tmp_path / 'fixed'}"))
    assert found_by(report) == [("no mask", "boxes.json", 12, 104)]
    kept = json.loads((tmp_path / "fixed" / "toy.json").read_text())
    assert 104 not in [entry["id"] for entry in kept["annotations"]]


def test_repairs_do_what_they_are_called(toy: Toy, tmp_path: Path) -> None:
    names = ("box half outside", "keypoint outside", "polygon of two points", "annotation id of two", "image missing")
    spoilt(toy, *(PLANTS[name] for name in names))
    check(check_config(toy_data(toy), tmp_path / "run", f"fix_dir={tmp_path}"))
    content = json.loads((tmp_path / "toy.json").read_text())
    entries = {entry["id"]: entry for entry in content["annotations"]}
    assert entries[108]["bbox"] == [36, 10, 8, 14]
    assert entries[101]["keypoints"] == [18, 8, 2, 0, 0, 0, 26, 20, 1]
    assert entries[101]["num_keypoints"] == 2
    assert entries[102]["segmentation"] == [[34, 10, 44, 10, 44, 30]]
    assert entries[111]["bbox"] == [1, 2, 3, 4], "two objects of one id are two objects"
    assert [image["id"] for image in content["images"]] == [11, 12, 13, 15, 16]
    assert content["categories"][0]["keypoints"] == ["head", "left_hand", "right_hand"]


@pytest.mark.parametrize(
    ("content", "kind"),
    [(b'{"images": [', "not JSON"), (b"[]", "not COCO"), (b"{}", "not COCO"), (b"\xff", "not JSON"), (None, "missing")],
)
def test_a_file_that_cannot_be_read_ends_the_check_with_its_fault(
    content: bytes | None, kind: str, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    toy.points.unlink() if content is None else toy.points.write_bytes(content)
    report = check(check_config(toy_data(toy), tmp_path, f"fix_dir={tmp_path / 'fixed'}"))
    ((found, file, image_id, annotation_id),) = found_by(report)
    assert kind in found
    assert (file, image_id, annotation_id) == ("points.json", None, None)
    assert not (tmp_path / "fixed").exists()
    assert "by hand" in capsys.readouterr().out


def test_a_broken_evaluation_set_does_not_hide_the_faults_of_training(toy: Toy, tmp_path: Path) -> None:
    spoilt(toy, PLANTS["image truncated"])
    val = f"data.val=[{{name: toy, images: {toy.images}, annotations: {toy.root / 'none.json'}}}]"
    report = check(check_config([*toy_data(toy), val], tmp_path))
    assert found_by(report) == [
        ("annotation file missing", "none.json", None, None),
        PLANTS["image truncated"].found[0],
    ]
    assert [source.name for source in report.sources] == ["train_toy", "val_toy"]


def test_what_training_would_refuse_as_a_whole_is_told(toy: Toy, tmp_path: Path) -> None:
    shutil.rmtree(toy.images)
    report = check(check_config(toy_data(toy), tmp_path))
    assert not report.clean
    assert "no image folder" in report.general[0]


def test_the_dry_run_trains_every_task(toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = check(check_config(toy_data(toy), tmp_path, "dry_run=auto", "threads=1", "dry_run_steps=8"))
    assert report.clean, capsys.readouterr().out
    assert {probe.task for probe in report.probe.tasks} == {*ALL}
    assert all(probe.labelled and probe.last < probe.first for probe in report.probe.tasks)
    seconds = report.probe.step_seconds
    assert report.probe.schedule_seconds == pytest.approx(seconds / 2 * 16 * 90000)
    assert report.probe.memory_bytes > 2**20
    assert "gradients arrive" in capsys.readouterr().out


def test_the_dry_run_expects_nothing_of_what_is_frozen(
    toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    frozen = ("solver.freeze=[trunk,mask]", "threads=1", "dry_run_steps=4")
    report = check(check_config(toy_data(toy), tmp_path, "dry_run=auto", *frozen))
    assert report.probe.faults == []
    assert {probe.task for probe in report.probe.tasks if not probe.learns} == {"mask"}
    assert "frozen with the trunk" in capsys.readouterr().out


def test_a_dry_run_of_faulty_data_is_made_only_when_asked_for(toy: Toy, tmp_path: Path) -> None:
    spoilt(toy, PLANTS["count of keypoints"])
    auto = check(check_config(toy_data(toy), tmp_path / "a", "dry_run=auto"))
    assert auto.probe is None
    asked = check(check_config(toy_data(toy), tmp_path / "b", "dry_run=true", "dry_run_steps=1"))
    assert asked.probe.steps == 1


def test_the_dry_run_finds_a_head_that_gets_no_gradient(
    toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mtl_rcnn.tasks.mask import MaskTask

    original = MaskTask.losses

    def detached(self, raw, regions):
        return {name: (total.detach() + 0 * raw.sum(), count) for name, (total, count) in
                original(self, raw, regions).items()}  # fmt: skip

    monkeypatch.setattr(MaskTask, "losses", detached)
    report = check(check_config(toy_data(toy), tmp_path, "dry_run=auto"))
    assert report.probe.faults == ["mask: all gradients of its parameters are 0"]
    assert not report.clean


def test_the_dry_run_finds_a_loss_that_is_not_finite(toy: Toy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from mtl_rcnn.tasks.keypoint import KeypointTask

    original = KeypointTask.losses

    def infinite(self, raw, regions):
        return {name: (total / 0, count) for name, (total, count) in original(self, raw, regions).items()}

    monkeypatch.setattr(KeypointTask, "losses", infinite)
    report = check(check_config(toy_data(toy), tmp_path, "dry_run=auto"))
    assert report.probe.faults == ["keypoint: loss keypoint/heatmap is inf"]
    written = json.loads((tmp_path / "check" / "faults.json").read_text())
    assert written["dry_run"]["tasks"][1]["last"] is None


def coco_config(root: Path, folder: Path, *overrides: str) -> DictConfig:
    fixed = ["device=cpu", "dry_run=false", "data.workers=2", f"output_dir={folder}", f"data.root={root}"]
    return compose("check", ["experiment=coco_mini", *fixed, *overrides])


def test_real_data_has_no_fault(coco_mini: Path, tmp_path: Path) -> None:
    report = check(coco_config(coco_mini, tmp_path))
    assert found_by(report) == []
    assert report.clean
    assert [source.dataset.report.kept for source in report.sources] == [80, 40]


def test_fifteen_faults_in_a_copy_of_real_data_are_found_and_no_other(coco_mini: Path, tmp_path: Path) -> None:
    root = tmp_path / "coco"
    shutil.copytree(coco_mini, root)
    planted = plant_in_coco(root)
    assert len(planted) == 15
    fixed = tmp_path / "fixed"
    report = check(coco_config(root, tmp_path / "run", f"fix_dir={fixed}"))
    assert found_by(report) == sorted(planted, key=str)
    assert [path.name for path in fixed.iterdir()] == ["coco_2017_train.json"], "the other set has no fault"
    again = check(coco_config(root, tmp_path / "again", f"data.train=[{{name: repaired, images: {root}/train2017, "
                              f"annotations: {fixed}/coco_2017_train.json}}]"))  # fmt: skip
    assert again.clean
    assert again.sources[0].dataset.report.kept == 75


@pytest.mark.slow
def test_the_tool_ends_with_status_1_where_there_is_a_fault(toy: Toy, tmp_path: Path) -> None:
    words = ["data.root=unused", "data.val=[]", *toy_data(toy), f"output_dir={tmp_path}", "dry_run=false"]
    run = partial(subprocess.run, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False)
    clean = run([sys.executable, "-W", "ignore", "tools/check_data.py", *words])
    assert clean.returncode == 0, clean.stderr
    assert "reading the images of toy (train): 6 images in" in clean.stdout
    spoilt(toy, PLANTS["box half outside"])
    faulty = run([sys.executable, "-W", "ignore", "-m", "mtl_rcnn.check", *words])
    assert faulty.returncode == 1, faulty.stderr
    assert "annotation 108: bbox [36, 10, 24, 14] reaches 16 pixels beyond the image" in faulty.stdout
    refused = run([sys.executable, "-W", "ignore", "-m", "mtl_rcnn.check", *words, "dry_run=perhaps"])
    assert (refused.returncode, refused.stdout) == (2, "")
    assert refused.stderr == "error: dry_run=perhaps: expected auto or true or false\n"
