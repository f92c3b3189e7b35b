"""The files of a labelled data set: one COCO JSON and folders of PNGs, all of them or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from contextlib import AbstractContextManager
from pathlib import Path, PurePath
from types import TracebackType
from typing import Any

import numpy as np
import yaml
from PIL import Image

from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.dataset_spec import is_file_field
from mtl_rcnn.data.inspection import write_coco
from mtl_rcnn.errors import ConfigError

ANNOTATIONS, ENTRY = "annotations.json", "dataset.yaml"


class LabelFiles(AbstractContextManager):
    """Writes into a folder of a temporary name, which is given its own when the block ends without an error.

    Args:
        folder: that must not exist yet, or be empty.
        images: the data set's folder of images, from which paths in a JSON are taken.

    Raises:
        ConfigError: the folder holds something already.
    """

    def __init__(self, folder: Path, images: Path) -> None:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise ConfigError(f"output_dir={folder}: exists already; choose another, or move it away")
        self.folder, self.images = folder, images
        self._temporary = folder.with_name(f".{folder.name}.tmp")
        self._names: set[str] = set()

    def __enter__(self) -> LabelFiles:
        shutil.rmtree(self._temporary, ignore_errors=True)
        self._temporary.mkdir(parents=True)
        return self

    def add(self, entry: Mapping[str, Any], key: str, values: np.ndarray) -> str:
        """Writes a map of labels and returns its path as the JSON holds it.

        Args:
            entry: the image's.
            key: the field that names the file: `depth_file_name` goes to the folder `depth`.
            values: (H, W) uint8 or uint16.
        """
        if values.dtype not in (np.uint8, np.uint16) or values.shape != (entry["height"], entry["width"]):
            raise TypeError(f"{key} of image {entry['id']}: {values.dtype} {values.shape}; expected uint8 or uint16")
        part = key.removesuffix("file_name").rstrip("_") or "labels"
        name = f"{part}/{PurePath(entry['file_name']).stem}.png"
        if name in self._names:  # two images of one name in different folders
            name = f"{part}/{len(self._names):08d}_{PurePath(entry['file_name']).stem}.png"
        self._names.add(name)
        path = self._temporary / name
        path.parent.mkdir(exist_ok=True)
        Image.fromarray(values).save(path)
        return self._seen_from_images(self.folder / name)

    def write(self, data: CocoData, node: Mapping[str, Any]) -> None:
        """Writes the JSON, and the data set's entry for a configuration.

        Args:
            data: with all labels.
            node: of the entry, but for where the images and the annotations are.
        """
        for entry in data.images.values():
            for key, value in entry.items():
                if is_file_field(key) and key != "file_name" and isinstance(value, str) and os.path.isabs(value):
                    entry[key] = self._seen_from_images(Path(value))
        write_coco(self._temporary / ANNOTATIONS, data)
        whole = {"name": None, "images": str(self.images), "annotations": str(self.folder / ANNOTATIONS), **node}
        (self._temporary / ENTRY).write_text(yaml.safe_dump([whole], sort_keys=False), encoding="utf-8")

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            os.replace(self._temporary, self.folder)
        else:
            shutil.rmtree(self._temporary, ignore_errors=True)

    def _seen_from_images(self, path: Path) -> str:
        return Path(os.path.relpath(path, self.images)).as_posix()
