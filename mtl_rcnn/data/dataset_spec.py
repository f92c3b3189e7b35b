"""One dataset as the configuration describes it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from mtl_rcnn.errors import ConfigError


@dataclass(frozen=True)
class DatasetSpec:
    """One entry of `data.train` or `data.val`.

    Attributes:
        name: of the dataset, unique in its list.
        images: folder of the image files.
        annotations: COCO JSON files of the same images; what else a `reader` reads.
        tasks: names of the tasks this dataset labels; None leaves it to what the annotations carry.
        classes: names of the categories to use; None for all of the files.
        limit: only the first so many of the images that are left.
        image_ids: only these images.
        repeat: how often each image comes in an epoch, on average; in training sets alone.
        reader: `_target_` of a `data.reader.DatasetReader` with its arguments; None reads COCO JSON files.
        image_fields: further fields of every image's entry, such as {depth_file_name: "depth/{stem}.png",
            depth_scale: 5000}; see `data.reader.read_dataset`.
        vocabularies: what the dataset's labels speak of, where its files do not say: name -> entries or names.
    """

    name: str
    images: str
    annotations: tuple[str, ...] = ()
    tasks: tuple[str, ...] | None = None
    classes: tuple[str, ...] | None = None
    limit: int | None = None
    image_ids: tuple[int | str, ...] | None = None
    repeat: float = 1.0
    reader: Mapping[str, Any] | None = None
    image_fields: Mapping[str, Any] = field(default_factory=dict)
    vocabularies: Mapping[str, Any] = field(default_factory=dict)

    @staticmethod
    def from_config(node: Mapping[str, Any], root: str = "", where: str = "data.train") -> DatasetSpec:
        """From a configuration node; relative paths are taken from `root`.

        Raises:
            ConfigError: an unknown, missing or malformed key, named with `where`.
        """
        known = [entry.name for entry in fields(DatasetSpec)]
        for key in node:
            if key not in known:
                raise ConfigError(f"{where}.{key}: unknown key{suggest(key, known)}; known: {', '.join(known)}")
        needed = ("name", "images") if node.get("reader") else ("name", "images", "annotations")
        for key in needed:
            if not node.get(key):
                raise ConfigError(f"{where}.{key}: missing; a dataset needs {' and '.join(needed)}")
        for key in ("reader", "image_fields", "vocabularies"):
            if not isinstance(node.get(key) or {}, Mapping):
                raise ConfigError(f"{where}.{key}={node[key]}: expected a mapping")
        limit = node.get("limit")
        if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
            raise ConfigError(f"{where}.limit={limit}: expected null or a number of images, at least 1")
        repeat = node.get("repeat", 1.0)
        if isinstance(repeat, bool) or not isinstance(repeat, int | float) or not 0 < repeat < float("inf"):
            raise ConfigError(f"{where}.repeat={repeat}: expected a number above 0, such as 2")
        files = node.get("annotations") or []
        files = [files] if isinstance(files, str | Path) else files
        return DatasetSpec(
            name=str(node["name"]),
            images=str(Path(root) / node["images"]),
            annotations=tuple(str(Path(root) / file) for file in files),
            tasks=_list(node, "tasks", where),
            classes=_list(node, "classes", where),
            limit=limit,
            image_ids=_list(node, "image_ids", where),
            repeat=float(repeat),
            reader=node.get("reader") or None,
            image_fields=_rooted(node.get("image_fields") or {}, root),
            vocabularies=dict(node.get("vocabularies") or {}),
        )


def is_file_field(key: str) -> bool:
    """Whether a field of an image's entry names a file: its name ends in file_name."""
    return key.endswith("file_name")


def suggest(word: str, candidates: Iterable[str]) -> str:
    """ " (did you mean 'x'?)" if a candidate is close, else nothing."""
    close = difflib.get_close_matches(str(word), list(candidates), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""


def _rooted(fields_: Mapping[str, Any], root: str) -> dict[str, Any]:
    return {key: str(Path(root) / value) if is_file_field(key) else value for key, value in fields_.items()}


def _list(node: Mapping[str, Any], key: str, where: str) -> tuple | None:
    value = node.get(key)
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise ConfigError(f"{where}.{key}={value}: expected null or a list, such as [{value}]")
    if not value and key != "tasks":
        raise ConfigError(f"{where}.{key}=[]: the list is empty; expected null for all, or the ones to use")
    return tuple(value)
