"""Pseudo-labels: what a network says becomes the labels a data set lacks, to the last pixel; what exists stays."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from networks import write_checkpoint
from omegaconf import OmegaConf
from PIL import Image
from tiny import available_tasks, need_tasks, tiny_config
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.mapper import Mapper, read_image
from mtl_rcnn.data.target import Record
from mtl_rcnn.engine.build import build_targets
from mtl_rcnn.engine.data import build_prepare
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError, UnreadableImageError
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.labelling import Labeller
from mtl_rcnn.predict.label_files import LabelFiles
from mtl_rcnn.predict.missing import objects_of
from mtl_rcnn.predict.pseudo import pseudo_label

TASKS = ("detection", "mask")
CLASSES = ["figure", "disc"]


@pytest.fixture(scope="module")
def network(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of a network that finds many things in any image."""
    need_tasks(*TASKS)
    tasks = [name for name in available_tasks() if name != "keypoint"]  # whose schema is another than the toy's
    return write_checkpoint(tmp_path_factory.mktemp("network") / "network.pth", tasks)


def label(network: Path, toy: Toy, folder: Path, *overrides: str, **node: Any) -> Path:
    """Labels the toy data set of figures and discs."""
    entry = {"name": "toy", "images": str(toy.images), "annotations": str(toy.boxes), "classes": CLASSES, **node}
    cfg = compose(
        "pseudo_label",
        [f"network={network}", f"output_dir={folder}", "device=cpu", "workers=0", "dataset={name: toy}", *overrides],
        checked=False,
    )
    OmegaConf.set_struct(cfg, False)
    cfg.dataset = {key: value for key, value in entry.items() if value is not None}
    return pseudo_label(cfg)


def content(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "annotations.json").read_text())


def read_back(folder: Path, restored: Restored) -> list[Record]:
    """The records of what was written, by its own entry for a configuration."""
    (node,) = OmegaConf.to_container(OmegaConf.load(folder / "dataset.yaml"))
    (dataset,), _ = build_datasets([DatasetSpec.from_config(node)], {}, restored.label_space)
    return dataset.records


def said(restored: Restored, record: Record, detect: bool) -> dict[str, torch.Tensor]:
    """What the network says of an image: of its objects, or of what it detects."""
    image = build_prepare(restored.cfg)(read_image(record))["image"]
    given = None if detect else objects_of(record)[1]
    return Labeller(InferenceNetwork(restored.model))(image, (record["height"], record["width"]), given)


def test_masks_of_annotated_boxes_are_the_networks(network: Path, toy: Toy, tmp_path: Path) -> None:
    before = json.loads(toy.boxes.read_text())
    for entry in before["annotations"]:
        if entry["id"] in (101, 103, 106):
            del entry["segmentation"]
    toy.boxes.write_text(json.dumps(before))
    folder = label(network, toy, tmp_path / "out", "only_tasks=[mask]", "threshold=0")
    after = {entry["id"]: entry for entry in content(folder)["annotations"]}
    assert content(folder)["images"] == before["images"]
    for entry in before["annotations"]:
        if entry["id"] not in (101, 103, 106):
            assert after[entry["id"]] == entry
        else:
            mark = {"checkpoint": str(network), "iteration": 0, "threshold": 0.0}
            assert after[entry["id"]].pop("pseudo") == {"mask": mark}
            after[entry["id"]].pop("segmentation")
            assert after[entry["id"]] == entry
    restored = restore(network)
    targets = build_targets(restored.cfg, restored.label_space)
    mapper = Mapper({name: targets[name] for name in TASKS}, [])
    found = 0
    for index, record in enumerate(read_back(folder, restored)):
        sample = mapper(record, index)
        if not record["annotations"]:
            continue
        masks = targets["mask"].as_prediction(sample)["masks"]
        objects = objects_of(record)[0]
        expected = said(restored, record, detect=False)["masks"]
        for row, entry in enumerate(objects):
            if entry["id"] in (101, 103, 106):
                assert torch.equal(masks[row], expected[row])
                found += int(masks[row].any())
    assert found > 0


def test_boxes_and_masks_of_an_unlabelled_folder_are_the_networks(network: Path, toy: Toy, tmp_path: Path) -> None:
    reader = {"_target_": "mtl_rcnn.data.reader.ImageFolder"}
    given = {"annotations": None, "classes": None, "reader": reader}
    folder = label(network, toy, tmp_path / "out", "only_tasks=[detection,mask]", "threshold=0.4", **given)
    restored = restore(network)
    assert [c["name"] for c in content(folder)["categories"]] == list(restored.label_space.classes)
    targets = build_targets(restored.cfg, restored.label_space)
    mapper = Mapper({name: targets[name] for name in TASKS}, [])
    number = 0
    for index, record in enumerate(read_back(folder, restored)):
        sample = mapper(record, index)
        assert sample["labelled"] == {"detection": True, "mask": True}
        expected = said(restored, record, detect=True)
        sure = expected["scores"] >= 0.4
        boxes = targets["detection"].as_prediction(sample)
        assert torch.equal(boxes["boxes"], expected["boxes"][sure])
        assert torch.equal(boxes["classes"], expected["classes"][sure])
        assert [entry["score"] for entry in record["annotations"]] == expected["scores"][sure].tolist()
        has = sample["instances"].gt_has_mask
        assert torch.equal(has, expected["mask_scores"][sure] >= 0.4)
        assert torch.equal(targets["mask"].as_prediction(sample)["masks"][has], expected["masks"][sure][has])
        number += int(sure.sum())
    assert number > 3


def test_objects_that_are_annotated_are_not_added_again(network: Path, toy: Toy, tmp_path: Path) -> None:
    restored = restore(network)
    first = label(network, toy, tmp_path / "first", "threshold=0.4", "only_tasks=[detection]", tasks=[])
    entry = OmegaConf.to_container(OmegaConf.load(first / "dataset.yaml"))[0]
    assert entry["tasks"] == ["detection"]
    before = json.loads(toy.boxes.read_text())["annotations"]
    after = content(first)["annotations"]
    ids = [a["id"] for a in after]
    assert len(ids) == len(set(ids))
    assert sorted((a for a in after if "pseudo" not in a), key=lambda a: a["id"]) == before
    assert len(after) > len(before)
    # What the first pass found counts as annotated in a second one that is told to look again.
    entry |= {"tasks": [], "annotations": str(first / "annotations.json")}
    second = label(network, toy, tmp_path / "second", "threshold=0.4", "only_tasks=[detection]", **entry)
    assert len(content(second)["annotations"]) == len(after)
    assert len(read_back(second, restored)) == 6


def test_an_image_that_is_labelled_is_left_alone(network: Path, toy: Toy, tmp_path: Path) -> None:
    folder = label(network, toy, tmp_path / "out", "only_tasks=[detection]", "threshold=0")
    before, after = json.loads(toy.boxes.read_text()), content(folder)
    assert after["annotations"] == sorted(before["annotations"], key=lambda a: (a["image_id"], a["id"]))
    assert after["images"] == before["images"]


def test_unsure_masks_are_said_to_be_unknown(network: Path, toy: Toy, tmp_path: Path) -> None:
    node = {"tasks": ["detection"], "classes": ["disc"]}
    content_ = json.loads(toy.boxes.read_text())
    for entry in content_["annotations"]:
        entry.pop("segmentation", None)
    toy.boxes.write_text(json.dumps(content_))
    folder = label(network, toy, tmp_path / "out", "only_tasks=[mask]", "+thresholds.mask=1", **node)
    assert all(a.get("segmentation") is None and "pseudo" not in a for a in content(folder)["annotations"])
    restored = restore(network)
    entry = OmegaConf.to_container(OmegaConf.load(folder / "dataset.yaml"))[0]
    spec = DatasetSpec.from_config({**entry, "tasks": ["detection", "mask"]})
    (dataset,), _ = build_datasets([spec], {}, restored.label_space)
    target = build_targets(restored.cfg, restored.label_space)["mask"]
    assert [target.check(record).instances for record in dataset.records] == [0] * 6


def test_images_that_cannot_be_read_stop_it_or_are_left_out(
    network: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (toy.images / "13.png").write_bytes(b"broken")
    with pytest.raises(UnreadableImageError, match=r"13\.png"):
        label(network, toy, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]
    folder = label(network, toy, tmp_path / "out", "on_error=skip")
    assert [image["id"] for image in content(folder)["images"]] == [11, 12, 14, 15, 16]
    assert "left out image 13: " in capsys.readouterr().out
    with pytest.raises(ConfigError, match="exists already; choose another"):
        label(network, toy, tmp_path / "out")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("only_tasks=[pose]", r"only_tasks=\['pose'\]: the network has no task 'pose'; it has .*detection"),
        ("only_tasks=[]", r"only_tasks=\[\]: nothing to label; the network can label .*detection"),
        ("+thresholds.pose=0.5", r"thresholds\.pose=0\.5: the tasks that are labelled are .*detection"),
        ("+thresholds.mask=1.5", r"thresholds\.mask=1\.5: expected a number from 0 to 1"),
    ],
)
def test_what_cannot_be_done_is_refused(override: str, message: str, network: Path, toy: Toy, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        label(network, toy, tmp_path / "out", override)
    assert not (tmp_path / "out").exists()


def test_a_task_that_cannot_write_labels_is_refused(toy: Toy, tmp_path: Path) -> None:
    need_tasks("detection", "keypoint")
    network = write_checkpoint(tmp_path / "network.pth", ("detection", "keypoint"))
    text = r"only_tasks=\['keypoint'\]: the task 'keypoint' does not say how .* \(KeypointTarget\.as_label\); tasks of"
    with pytest.raises(ConfigError, match=text):
        label(network, toy, tmp_path / "out", "only_tasks=[keypoint]")
    with pytest.raises(ConfigError, match=r"threshold=2: expected a number from 0 to 1"):
        compose("pseudo_label", ["network=x", "output_dir=x", "dataset={name: x}", "threshold=2"])


def test_labels_of_one_part_are_not_written(toy: Toy, tmp_path: Path) -> None:
    need_tasks("image_label")
    network = write_checkpoint(tmp_path / "network.pth", ("image_label",), "tasks.image_label.part=time")
    why = "the task 'image_label' knows the part 'time' alone, and an image"
    with pytest.raises(ConfigError, match=rf"only_tasks=\['image_label'\]: {why} .*; tasks of this network .*: none"):
        label(network, toy, tmp_path / "out", "only_tasks=[image_label]")
    with pytest.raises(ConfigError, match=f"the network can label nothing; {why}"):
        label(network, toy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_maps_find_their_images_also_in_folders_of_one_name(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.uint16).reshape(3, 4) * 5000
    with LabelFiles(tmp_path / "out", tmp_path / "images") as files:
        entries = [{"id": i, "file_name": f"{i}/a.jpg", "height": 3, "width": 4} for i in range(2)]
        paths = [files.add(entry, "depth_file_name", values + index) for index, entry in enumerate(entries)]
    for index, path in enumerate(paths):
        assert (np.array(Image.open(os.path.normpath(tmp_path / "images" / path))) == values + index).all()
    with pytest.raises(ZeroDivisionError), LabelFiles(tmp_path / "broken", tmp_path):
        raise ZeroDivisionError
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out"]


def test_maps_of_whole_images_are_the_networks(network: Path, toy: Toy, tmp_path: Path) -> None:
    need_tasks("semantic", "depth")
    before = json.loads(toy.boxes.read_text())
    own = next(image for image in before["images"] if image["id"] == 11)
    for image in before["images"]:
        if image["id"] != 11:  # one is labelled already
            for key in ("sem_seg_file_name", "depth_file_name"):  # a scale without a map is none
                image.pop(key, None)
    toy.boxes.write_text(json.dumps(before))
    folder = label(network, toy, tmp_path / "out", "only_tasks=[semantic,depth]", "+thresholds.semantic=0.4")
    images = {image["id"]: image for image in content(folder)["images"]}
    assert images[11] == own
    mark = {"checkpoint": str(network), "iteration": 0}
    assert images[12]["pseudo"] == {"depth": {**mark, "threshold": 0.7}, "semantic": {**mark, "threshold": 0.4}}
    restored = restore(network)
    targets = build_targets(restored.cfg, restored.label_space)
    mapper = Mapper({name: targets[name] for name in ("semantic", "depth")}, [])
    known = []
    for index, record in enumerate(read_back(folder, restored)):
        if record["image_id"] == 11:
            continue
        expected = said(restored, record, detect=False)
        sample = mapper(record, index)
        depth = targets["depth"].as_prediction(sample)["depth"]
        torch.testing.assert_close(depth, expected["depth"], rtol=0, atol=0.5 / record["depth_scale"] + 1e-6)
        if sample["labelled"]["semantic"]:
            sure = expected["sem_seg_confidence"] >= 0.4
            classes = targets["semantic"].as_prediction(sample)["sem_seg"]
            assert torch.equal(classes[sure].long(), expected["sem_seg"][sure].long())
            assert (classes[~sure] == -1).all()
            known.append(float(sure.float().mean()))
    assert max(known) > 0


def test_images_of_which_nothing_is_sure_are_told(
    network: Path, toy: Toy, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    need_tasks("semantic")
    only = ["only_tasks=[semantic]", "threshold=1"]
    content_ = json.loads(toy.boxes.read_text())
    for image in content_["images"]:
        image.pop("sem_seg_file_name", None)
    toy.boxes.write_text(json.dumps(content_))
    folder = label(network, toy, tmp_path / "out", *only, tasks=["detection"])
    assert "some images are without a label of semantic: a data set whose `tasks` name" in capsys.readouterr().out
    assert OmegaConf.to_container(OmegaConf.load(folder / "dataset.yaml"))[0]["tasks"] == ["detection"]
    assert content(folder)["images"] == content_["images"]


def test_a_run_trains_on_what_was_labelled(network: Path, toy: Toy, tmp_path: Path) -> None:
    given = {"annotations": None, "classes": None, "reader": {"_target_": "mtl_rcnn.data.reader.ImageFolder"}}
    folder = label(network, toy, tmp_path / "out", "threshold=0.4", **given)
    (entry,) = OmegaConf.to_container(OmegaConf.load(folder / "dataset.yaml"))
    own = f"{{name: own, images: {toy.images}, annotations: {toy.boxes}, tasks: [detection]}}"
    pseudo = json.dumps({**entry, "name": "pseudo"}).replace('"', "")
    small = [
        *(
            "solver.batch_size=4",
            "solver.max_iter=3",
            "solver.steps=[]",
            "solver.warmup_iters=0",
            "solver.log_period=1",
        ),
        *("solver.eval_period=0", "solver.checkpoint_period=0", "data.workers=0", "device=cpu", "threads=1"),
        *("data.train_augment.resize.short_edge_length=[48]", "data.mixing.method=uniform", "report.enabled=false"),
    ]
    labelled = [name for name in ("detection", "mask", "semantic", "depth") if name in available_tasks()]
    cfg = tiny_config(labelled, f"data.train=[{own},{pseudo}]", "data.val=[]", f"output_dir={tmp_path / 'run'}", *small)
    rows = read_metrics(train(cfg).folder / "metrics.jsonl")
    assert len(rows) == 3
    for task in labelled:
        assert all(any(row[name] > 0 for name in row if name.startswith(f"{task}/")) for row in rows)
