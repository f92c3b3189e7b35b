"""Readers of other formats, further fields of images, and vocabularies merged by name."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from toy import VOCABULARIES, Toy

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.reader import read_dataset
from mtl_rcnn.errors import ConfigError, DataError

FOLDER = {"_target_": "mtl_rcnn.data.reader.ImageFolder", "pattern": "*.jpg"}


@pytest.fixture
def frames(tmp_path: Path) -> Path:
    """Two photos, one of them turned by its EXIF orientation, a map of the first, and a file that is no image."""
    picture = Image.fromarray(np.zeros((20, 30, 3), np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    picture.save(tmp_path / "b.jpg", exif=turned)
    picture.save(tmp_path / "a.jpg")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(tmp_path / "map_a.png")
    (tmp_path / "notes.txt").write_text("no image")
    return tmp_path


def test_a_folder_of_images_is_a_dataset(frames: Path) -> None:
    node = {
        "name": "frames",
        "images": str(frames),
        "reader": FOLDER,
        "image_fields": {"depth_file_name": f"{frames}/map_{{stem}}.png", "depth_scale": 5000},
        "vocabularies": {"sem_seg_classes": ["sky", "ground"]},
    }
    data = read_dataset(DatasetSpec.from_config(node))
    first, second = data.images.values()
    assert (first["file_name"], first["height"], first["width"]) == ("a.jpg", 20, 30)
    assert (second["file_name"], second["height"], second["width"]) == ("b.jpg", 30, 20)
    assert first["depth_file_name"] == str(frames / "map_a.png")
    assert "depth_file_name" not in second
    assert first["depth_scale"] == second["depth_scale"] == 5000
    (dataset,), space = build_datasets([DatasetSpec.from_config(node)], {})
    assert dataset.records[0]["file_name"] == str(frames / "a.jpg")
    assert dataset.records[0]["vocabularies"] == {"sem_seg_classes": {0: 0, 1: 1}}
    assert [entry["name"] for entry in space.vocabulary("sem_seg_classes", "task")] == ["sky", "ground"]


def test_files_named_in_a_json_lie_relative_to_the_images(toy: Toy) -> None:
    (dataset,), space = build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {})
    record = dataset.records[0]
    assert record["sem_seg_file_name"] == str(toy.root / "classes" / "11.png")
    assert record["vocabularies"]["sem_seg_classes"] == {0: 0, 1: 1, 4: 2}
    assert [entry["name"] for entry in space.vocabularies["attributes"]] == ["colour", "marks", "weight"]
    assert LabelSpace.from_state(json.loads(json.dumps(space.state()))).vocabularies == space.vocabularies


def test_vocabularies_of_several_datasets_merge_by_name(toy: Toy) -> None:
    other = toy.root / "other.json"
    content = json.loads(toy.boxes.read_text())
    content["vocabularies"] = {"sem_seg_classes": [{"id": 7, "name": "edge"}, {"id": 9, "name": "water"}]}
    other.write_text(json.dumps(content))
    nodes = [toy.node(), toy.node(name="other", annotations="other.json")]
    datasets, space = build_datasets([DatasetSpec.from_config(node, str(toy.root)) for node in nodes], {})
    assert [entry["name"] for entry in space.vocabularies["sem_seg_classes"]] == ["ground", "thing", "edge", "water"]
    assert datasets[1].records[0]["vocabularies"]["sem_seg_classes"] == {7: 2, 9: 3}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"sem_seg_classes": 3}, "sem_seg_classes: the vocabulary is 3; expected a list"),
        ({"sem_seg_classes": [3]}, r"sem_seg_classes\[0\]: the vocabulary is 3; expected a name"),
        ({"sem_seg_classes": ["a", "a"]}, "has the name 'a' twice"),
        ({"sem_seg_classes": [{"id": 1, "name": "a"}, {"id": 1, "name": "b"}]}, "has the id 1 twice"),
    ],
)
def test_malformed_vocabularies_are_refused(toy: Toy, given: dict, said: str) -> None:
    with pytest.raises(DataError, match=said):
        read_dataset(DatasetSpec.from_config(toy.node(vocabularies=given), str(toy.root)))


def test_words_that_the_network_does_not_know_are_refused(toy: Toy) -> None:
    space = LabelSpace(({"name": "figure"}, {"name": "disc"}, {"name": "square"}), {"image_labels": ({"name": "red"},)})
    with pytest.raises(DataError, match="image_labels 'blue', 'day', 'night' are unknown to the network"):
        build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {}, space)


def test_a_vocabulary_that_no_dataset_has_is_named(toy: Toy) -> None:
    space = LabelSpace((), {name: tuple(entries) for name, entries in VOCABULARIES.items()})
    with pytest.raises(ConfigError, match="the task 'genre' needs the vocabulary 'genres'"):
        space.vocabulary("genres", "genre")


def test_a_reader_must_be_one(frames: Path) -> None:
    node = {"name": "frames", "images": str(frames), "reader": {"_target_": "mtl_rcnn.data.mapper.Mapper"}}
    with pytest.raises(ConfigError, match=r"expected a subclass of .*DatasetReader"):
        read_dataset(DatasetSpec.from_config(node))
    node["reader"] = {**FOLDER, "patern": "*"}
    with pytest.raises(ConfigError, match="ImageFolder does not take these arguments"):
        read_dataset(DatasetSpec.from_config(node))


def test_a_damaged_image_is_named(frames: Path) -> None:
    (frames / "c.jpg").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"c.jpg: the image cannot be read"):
        read_dataset(DatasetSpec.from_config({"name": "frames", "images": str(frames), "reader": FOLDER}))
