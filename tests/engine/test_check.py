"""The check of the data: every planted fault is found where it is, nothing is invented, and repaired data is clean."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import pytest
from omegaconf import DictConfig, OmegaConf
from tiny import NETWORK, TASKS
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine.check import CheckReport, check

ROOT = Path(__file__).resolve().parents[2]
ALL = ("detection", "mask", "keypoint")
Found = tuple[str, str, Any, Any]
"""Kind, name of the file, image id, annotation id."""


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


@dataclass(frozen=True)
class Plant:
    """A fault to plant.

    Attributes:
        spoil: changes the contents of both JSON files (boxes, points), or the folder of images.
        found: what must be found.
    """

    spoil: Callable[[dict, dict, Path], Any]
    found: tuple[Found, ...]


def box(number: int, **fields: Any) -> Callable[[dict, dict, Path], Any]:
    """Changes an annotation of boxes.json."""
    return lambda boxes, points, images: _entry(boxes, number).update(fields)


def point(number: int, **fields: Any) -> Callable[[dict, dict, Path], Any]:
    """Changes an annotation of points.json."""
    return lambda boxes, points, images: _entry(points, number).update(fields)


def _entry(content: dict, number: int) -> dict:
    return next(entry for entry in content["annotations"] if entry["id"] == number)


def _both(number: int, **fields: Any) -> Callable[[dict, dict, Path], Any]:
    def spoil(boxes: dict, points: dict, images: Path) -> None:
        for content in (boxes, points):
            _entry(content, number).update(fields)

    return spoil


def _image(content: dict, number: int) -> dict:
    return next(entry for entry in content["images"] if entry["id"] == number)


def _resize(boxes: dict, points: dict, images: Path) -> None:
    for content in (boxes, points):
        _image(content, 14).update(width=71)


def _directory(boxes: dict, points: dict, images: Path) -> None:
    (images / "14.png").unlink()
    (images / "14.png").mkdir()


def _write(name: str, change: Callable[[bytes], bytes]) -> Callable[[dict, dict, Path], Any]:
    return lambda boxes, points, images: (images / name).write_bytes(change((images / name).read_bytes()))


PLANTS = {
    "image missing": Plant(
        lambda b, p, images: (images / "14.png").unlink(), (("image file missing", "14.png", 14, None),)
    ),
    "image truncated": Plant(_write("12.png", lambda d: d[: len(d) // 2]), (("damaged image", "12.png", 12, None),)),
    "image of zero bytes": Plant(_write("13.png", lambda d: b""), (("empty image file", "13.png", 13, None),)),
    "image of text": Plant(_write("13.png", lambda d: b"<html>"), (("damaged image", "13.png", 13, None),)),
    "directory for image": Plant(_directory, (("folder in place of an image", "14.png", 14, None),)),
    "size of another image": Plant(_resize, (("image of another size", "14.png", 14, None),)),
    "image id twice": Plant(
        lambda b, p, i: b["images"].append({**b["images"][0]}), (("duplicate image id", "boxes.json", 11, None),)
    ),
    "annotation id twice": Plant(
        lambda b, p, i: b["annotations"].append({**_entry(b, 108)}),
        (("duplicate annotation id", "boxes.json", 15, 108),),
    ),
    "annotation id of two": Plant(
        lambda b, p, i: b["annotations"].append({**_entry(b, 108), "bbox": [1, 2, 3, 4], "segmentation": []}),
        (("duplicate annotation id", "boxes.json", 15, 108),),
    ),
    "unknown image": Plant(box(104, image_id=99), (("annotation of an unknown image", "boxes.json", 99, 104),)),
    "unknown category": Plant(
        box(104, category_id=77), (("annotation of an unknown category", "boxes.json", 12, 104),)
    ),
    "annotation without category": Plant(
        lambda b, p, i: _entry(b, 104).pop("category_id"),
        (("annotation without category_id", "boxes.json", 12, 104),),
    ),
    "image without height": Plant(
        lambda b, p, i: _image(b, 14).pop("height"), (("image without height", "boxes.json", 14, None),)
    ),
    "image of no width": Plant(
        lambda b, p, i: _image(b, 14).update(width=0), (("image size", "boxes.json", 14, None),)
    ),
    "NaN box": Plant(
        box(106, bbox=[1.0, float("nan"), 3.0, 4.0]), (("malformed box", "boxes.json", 13, 106),)
    ),
    "box of corners": Plant(box(106, bbox=[30, 20, -10, 5]), (("negative box", "boxes.json", 13, 106),)),
    "box without area": Plant(box(109, bbox=[20, 50, 0, 16]), (("empty box", "boxes.json", 15, 109),)),
    "box half outside": Plant(
        box(108, bbox=[36, 10, 24, 14]), (("box outside the image", "boxes.json", 15, 108),)
    ),
    "box far outside": Plant(
        box(108, bbox=[400, 10, 24, 14]), (("box outside the image", "boxes.json", 15, 108),)
    ),
    "no box": Plant(lambda b, p, i: _entry(b, 109).pop("bbox"), (("no box", "boxes.json", 15, 109),)),
    "crowd of three": Plant(box(109, iscrowd=3), (("iscrowd", "boxes.json", 15, 109),)),
    "polygon of two points": Plant(
        box(102, segmentation=[[1, 1, 9, 9], [34, 10, 44, 10, 44, 30]]),
        (("malformed polygon", "boxes.json", 11, 102),),
    ),
    "polygon of odd length": Plant(
        box(102, segmentation=[[1, 1, 9, 9, 5, 5, 7]]), (("malformed polygon", "boxes.json", 11, 102),)
    ),
    "crowd's mask of another size": Plant(
        box(105, segmentation={"size": [50, 70], "counts": [3500]}),
        (("mask of another size", "boxes.json", 13, 105),),
    ),
    "run lengths that end early": Plant(
        box(105, segmentation={"size": [40, 80], "counts": [100, 100]}),
        (("malformed run lengths", "boxes.json", 13, 105),),
    ),
    "compressed run lengths cut short": Plant(
        lambda b, p, i: _entry(b, 105)["segmentation"].update(counts=_entry(b, 105)["segmentation"]["counts"][:-3]),
        (("malformed run lengths", "boxes.json", 13, 105),),
    ),
    "too few keypoints": Plant(
        point(101, keypoints=[18, 8, 2]), (("keypoint array of another length", "points.json", 11, 101),)
    ),
    "visibility of 3": Plant(
        point(101, keypoints=[18, 8, 3, 10, 20, 2, 26, 20, 1]), (("keypoint visibility", "points.json", 11, 101),)
    ),
    "keypoint outside": Plant(
        point(101, keypoints=[18, 8, 2, 10, 200, 2, 26, 20, 1]),
        (("keypoint outside the image", "points.json", 11, 101),),
    ),
    "count of keypoints": Plant(point(110, num_keypoints=1), (("num_keypoints", "points.json", 16, 110),)),
    "infinite keypoint": Plant(
        point(101, keypoints=[18, 8, 2, float("inf"), 200, 2, 26, 20, 1]),
        (("malformed keypoints", "points.json", 11, 101),),
    ),
    "area of a text": Plant(box(109, area="large"), (("area", "boxes.json", 15, 109),)),
    "files that disagree": Plant(
        point(110, bbox=[0, 0, 5, 5]), (("files contradict each other", "points.json", 16, 110),)
    ),
    "two kinds in one annotation": Plant(
        _both(110, bbox=[38, 2, 44, 32], num_keypoints=7),
        (("box outside the image", "boxes.json", 16, 110), ("num_keypoints", "points.json", 16, 110)),
    ),
}  # fmt: skip


def spoilt(toy: Toy, *plants: Plant) -> None:
    contents = [json.loads(path.read_text()) for path in (toy.boxes, toy.points)]
    for plant in plants:
        plant.spoil(*contents, toy.images)
    for path, content in zip((toy.boxes, toy.points), contents):
        path.write_text(json.dumps(content))


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


def _planted_in_coco(root: Path) -> list[Found]:
    """Fifteen faults in a copy of real COCO files; returns what must be found."""
    train = root / "train2017"
    files = {kind: root / "annotations" / f"{kind}_train2017.json" for kind in ("instances", "person_keypoints")}
    boxes, points = (json.loads(path.read_text()) for path in files.values())
    persons = [entry for entry in points["annotations"] if not entry["iscrowd"] and entry["num_keypoints"] > 5]
    things = [e for e in boxes["annotations"] if not e["iscrowd"] and e["category_id"] != 1]
    images = boxes["images"]
    damaged = images[-5:]
    # Each fault in an image of its own, so that what is left out with one does not hide another.
    of_images = iter({e["image_id"]: e for e in things if e["image_id"] not in [i["id"] for i in damaged]}.values())
    of_persons = iter({e["image_id"]: e for e in persons if e["image_id"] not in [i["id"] for i in damaged]}.values())
    found: list[Found] = []

    def plant(kind: str, file: str, entry: dict, **fields: Any) -> None:
        entry.update(fields)
        found.append((kind, file, entry["image_id"], entry["id"]))

    def damage(kind: str, image: dict, data: bytes | None) -> None:
        (train / image["file_name"]).unlink()
        if data is not None:
            (train / image["file_name"]).write_bytes(data)
        found.append((kind, image["file_name"], image["id"], None))

    whole = (train / damaged[0]["file_name"]).read_bytes()
    damage("damaged image", damaged[0], whole[: len(whole) * 3 // 4])
    damage("empty image file", damaged[1], b"")
    damage("image file missing", damaged[2], None)
    damage("folder in place of an image", damaged[3], None)
    (train / damaged[3]["file_name"]).mkdir()
    damage("image of another size", damaged[4], whole)
    a, b, c, d, e, f = (next(of_images) for _ in range(6))
    plant("malformed box", "instances_train2017.json", a, bbox=[1.0, 2.0, float("nan"), 4.0])
    plant("negative box", "instances_train2017.json", b, bbox=[50, 50, -10, -10])
    plant("box outside the image", "instances_train2017.json", c, bbox=[5000, 10, 20, 20])
    plant("annotation of an unknown category", "instances_train2017.json", d, category_id=1000)
    plant("malformed polygon", "instances_train2017.json", e, segmentation=[[1, 2, 3, 4]])
    plant("mask of another size", "instances_train2017.json", f, segmentation={"size": [7, 7], "counts": [49]})
    boxes["annotations"].append(dict(boxes["annotations"][0]))
    found.append(("duplicate annotation id", "instances_train2017.json", boxes["annotations"][0]["image_id"],
                  boxes["annotations"][0]["id"]))  # fmt: skip
    g, h, i = (next(of_persons) for _ in range(3))
    plant("keypoint array of another length", "person_keypoints_train2017.json", g, keypoints=g["keypoints"][:-3])
    plant("keypoint visibility", "person_keypoints_train2017.json", h, keypoints=[5, 5, 7, *h["keypoints"][3:]],
          num_keypoints=sum(v > 0 for v in [7, *h["keypoints"][5::3]]))  # fmt: skip
    plant("num_keypoints", "person_keypoints_train2017.json", i, num_keypoints=16 - i["num_keypoints"] % 2 * 15)
    for path, content in zip(files.values(), (boxes, points)):
        path.write_text(json.dumps(content))
    return found


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
    planted = _planted_in_coco(root)
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
