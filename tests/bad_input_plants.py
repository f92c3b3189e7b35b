"""Ways to spoil the toy data set, and what a user does then: the verbs of `bad_input_cases`."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from tiny import LABEL_SPACE, tiny_config
from toy import Toy
from whole_load import load_everything

from mtl_rcnn.config import compose
from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.coverage import label_table
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.loader import build_eval_loader, build_train_loader
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.planner import BatchPlanner
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import model_file
from mtl_rcnn.engine.balance import build_balancer
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.checkpoint import KEYS
from mtl_rcnn.engine.restore import restore

# Ways to plant


def edit(change: Callable[[dict], Any], file: str = "boxes") -> Callable[[Toy], None]:
    """Changes the content of a JSON file."""

    def spoil(toy: Toy) -> None:
        path = getattr(toy, file)
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    return spoil


def entry(number: int, file: str = "boxes", **fields: Any) -> Callable[[Toy], None]:
    """Changes fields of an annotation."""
    return edit(lambda c: next(a for a in c["annotations"] if a["id"] == number).update(fields), file)


def category(file: str = "points", **fields: Any) -> Callable[[Toy], None]:
    """Changes fields of a file's first category."""
    return edit(lambda c: c["categories"][0].update(fields), file)


def raw(data: bytes, file: str = "boxes") -> Callable[[Toy], None]:
    """Overwrites a JSON file."""
    return lambda toy: getattr(toy, file).write_bytes(data)


def image(change: Callable[[Path], Any]) -> Callable[[Toy], None]:
    """Changes image file 12.png."""
    return lambda toy: change(toy.images / "12.png")


def nothing(toy: Toy) -> None:
    """The fault is in what the user types."""


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-300])


def folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def turned(path: Path) -> None:
    """Gives an image, 48 x 64 upright, an EXIF orientation that turns it."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.open(path).save(path, exif=exif)


def _other_name(path: Path) -> None:
    """Names the file as a system with another encoding than UTF-8 would."""
    os.rename(os.fsencode(path), os.fsencode(path.parent) + b"/bild_\xe4.png")


def non_utf8(toy: Toy) -> None:
    _other_name(toy.images / "12.png")
    edit(lambda c: c["images"][1].update(file_name="bild_ä.png"))(toy)
    edit(lambda c: c["images"][1].update(file_name="bild_ä.png"), "points")(toy)


def words(labels: Any) -> Callable[[Toy], None]:
    """Gives image 11 other labels of its own, in both files."""
    changes = [edit(lambda c: c["images"][0].update(image_labels=labels), file) for file in ("boxes", "points")]
    return lambda toy: [change(toy) for change in changes]


def folders(*names: str) -> Callable[[Toy], None]:
    """Puts an image into folders of these names; a name that ends in / stays empty."""

    def spoil(toy: Toy) -> None:
        for name in names:
            (toy.root / "folders" / name).mkdir(parents=True)
            if not name.endswith("/"):
                (toy.images / "11.png").rename(toy.root / "folders" / name / "11.png")

    return spoil


def vocabulary(position: int, **fields: Any) -> Callable[[Toy], None]:
    """Changes fields of a group of attributes, in both files."""

    def spoil(toy: Toy) -> None:
        for file in ("boxes", "points"):
            edit(lambda c: c["vocabularies"]["attributes"][position].update(fields), file)(toy)

    return spoil


def classes(value: Any, size: tuple[int, ...] = (64, 48)) -> Callable[[Toy], None]:
    """Overwrites the map of classes of image 12 with one value, or changes its file by a function."""
    return lambda toy: _spoil_map(toy.root / "classes" / "12.png", value, size)


def distances(value: float, size: tuple[int, ...] = (64, 48)) -> Callable[[Toy], None]:
    """Overwrites the map of distances of image 12 with one value, as a TIFF where PNG cannot hold it."""
    return lambda toy: _spoil_map(toy.root / "distances" / "12.png", value, size, np.float32)


def no_vocabulary(toy: Toy) -> None:
    """Takes the classes of the maps out of both files."""
    for file in ("boxes", "points"):
        edit(lambda c: c["vocabularies"].pop("sem_seg_classes"), file)(toy)


def _spoil_map(path: Path, value: Any, size: tuple[int, ...], dtype: type = np.uint8) -> None:
    if callable(value):
        value(path)
    else:
        Image.fromarray(np.full(size, value, dtype)).save(path, format="TIFF" if dtype is np.float32 else "PNG")


def lines(number: int, **fields: Any) -> Callable[[Toy], None]:
    """Changes fields of a line of text of image 11."""
    return edit(lambda c: c["images"][0]["text_lines"][number].update(fields))


ICDAR: dict[str, Any] = {"annotations": [], "reader": {"_target_": "mtl_rcnn.data.icdar.IcdarFolder"}}
"""Keys of a data set that reads the files that `icdar` plants."""


def icdar(line: str | bytes) -> Callable[[Toy], None]:
    """Puts a file of ICDAR's beside image 12, with this for its second line."""
    data = line.encode() if isinstance(line, str) else line
    return lambda toy: (toy.images / "gt_12.txt").write_bytes(b"2,6,46,6,46,20,2,20,alone\r\n" + data)


# What the user does


def type_(*overrides: str) -> Callable[[Toy], None]:
    """Composes a training configuration, as every tool does first."""
    return lambda toy: compose("train", ["data.root=unused", *overrides])


def balance(*overrides: str, tasks: tuple[str, ...] = ("semantic", "depth")) -> Callable[[Toy], None]:
    """Builds a network and what balances its tasks."""

    def run(toy: Toy) -> None:
        cfg = tiny_config(tasks, *overrides)
        build_balancer(cfg, build_model(cfg, LABEL_SPACE), None)

    return run


def mix(*overrides: str, repeat: float = 1) -> Callable[[Toy], None]:
    """Composes a training configuration of the training sets `one` and `two`."""
    entries = f"{{name: one, images: x, annotations: x, repeat: {repeat}}}, {{name: two, images: x, annotations: x}}"
    return type_(f"data.train=[{entries}]", *overrides)


def specify(**spec: Any) -> Callable[[Toy], None]:
    """Loads everything with other keys in the data set's entry."""
    return lambda toy: load_everything(toy, **spec)


def _records(toy: Toy) -> list[Any]:
    (dataset,), _ = build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {}, on_error="skip")
    return dataset.records


def load_words(toy: Toy, *overrides: str) -> None:
    """Reads the labels of images."""
    datasets, space = build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {})
    targets = build_targets(tiny_config(["image_label"], *overrides), space)
    label_table(datasets, targets)


def read_folders(toy: Toy, **reader: Any) -> None:
    """Reads folders that are named by what they show."""
    target = {"_target_": "mtl_rcnn.data.labelled_folders.LabelledFolders", "parts": ["colour", "garment"]}
    node = {"name": "photos", "images": "folders", "reader": {**target, **reader}}
    build_datasets([DatasetSpec.from_config(node, str(toy.root))], {})


def skip_in_evaluation(toy: Toy) -> None:
    """Reads all images with data.on_error=skip; raises what was excluded, as a text."""
    loader = build_eval_loader(_records(toy), Mapper({}, [], on_error="skip", training=False))
    samples = [sample for batch in loader for sample in batch]
    assert len(samples) + len(loader.excluded) == 6
    raise Excluded(" ".join(exclusion.reason for exclusion in loader.excluded.values()))


def skip_missing(toy: Toy) -> None:
    """Reads a data set with data.on_error=skip; raises its report, as a text."""
    (dataset,), _ = build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))], {}, on_error="skip")
    raise Excluded(str(dataset.report))


def train_on_nothing(toy: Toy) -> None:
    """Trains on images none of which can be read, with data.on_error=skip."""
    records = _records(toy)
    planner = BatchPlanner([(record["height"], record["width"]) for record in records], 2, 2, seed=0)
    next(iter(build_train_loader(records, Mapper({}, [], on_error="skip"), planner)))


def evaluate_unknown(toy: Toy) -> None:
    """Maps a data set to a network that knows other classes."""
    spec = DatasetSpec.from_config(toy.node(), str(toy.root))
    _, space = build_datasets([DatasetSpec.from_config(toy.node(classes=["square"]), str(toy.root))], {})
    build_datasets([spec], {}, space)


def twice(toy: Toy) -> None:
    """Configures two data sets of one name."""
    build_datasets([DatasetSpec.from_config(toy.node(), str(toy.root))] * 2, {})


def load_checkpoint(toy: Toy) -> None:
    """Opens a checkpoint."""
    checkpoints.load(toy.root / "model.pth")


def restore_weights(toy: Toy) -> None:
    """Rebuilds a network from a file of its weights alone."""
    restore(toy.root / "model.safetensors")


class Excluded(Exception):
    """Carries a count out of a case that ends without an error."""


class Evil:
    """A pickle that makes a folder when it is opened."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.mkdir, (str(self.path),)


def saved(toy: Toy, **parts: Any) -> Path:
    path = toy.root / "model.pth"
    torch.save({**dict.fromkeys(KEYS), "format": 1, "model": {}, **parts}, path)
    return path


def exported(change: Callable[[bytes], bytes]) -> Callable[[Toy], None]:
    """Writes weights alone, and changes the file's bytes."""

    def spoil(toy: Toy) -> None:
        path = toy.root / "model.safetensors"
        model_file.save(path, {"w": torch.ones(1000)}, dict.fromkeys(model_file.DESCRIPTION))
        path.write_bytes(change(path.read_bytes()))

    return spoil


def flip_checkpoint(toy: Toy) -> None:
    path = saved(toy, model={"w": torch.ones(1000)})
    content = bytearray(path.read_bytes())
    content[content.index(torch.ones(9).numpy().tobytes())] ^= 4
    path.write_bytes(content)


def cut_checkpoint(toy: Toy) -> None:
    path = saved(toy, model={"w": torch.ones(1000)})
    path.write_bytes(path.read_bytes()[:2000])
