"""Images in folders whose names say what they show: `red_dress/`, `blue_jeans/`.

reader:
  _target_: mtl_rcnn.data.labelled_folders.LabelledFolders
  parts: [colour, garment]
  split: train
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mtl_rcnn.data.coco import CocoData
from mtl_rcnn.data.dataset_spec import DatasetSpec, suggest
from mtl_rcnn.data.faults import Fault, Sink
from mtl_rcnn.data.image_file import IMAGE_SUFFIXES
from mtl_rcnn.data.reader import DatasetReader, coco_data, image_entries
from mtl_rcnn.errors import ConfigError

VOCABULARY = "image_labels"
SPLITS = ("train", "val", "all", "left_out")


class LabelledFolders(DatasetReader):
    """Folders whose names are one word per part, joined by a separator; an image's words are its `image_labels`.

    The vocabulary holds the words of all folders, whatever the split: part after part, sorted within each, so that it
    depends on the folders' names alone. Ids count all images by folder and name, so that an image has the same in
    every split.

    Args:
        parts: names of the parts, in the order of the words.
        separator: between the words.
        split: "train" or "val", "all" of both, or "left_out".
        fraction: share of each folder's images, in 0..1, that is "val"; which ones is a function of the seed and of
            each image's path below the dataset's folder alone.
        seed: of the split.
        only: names of the parts whose words become labels; None for all.
        leave_out: folder, or list of folders, that are neither in "train" nor in "val", but in "left_out": a
            combination of words that the network never saw together.

    Raises:
        ConfigError: a split that does not exist, a fraction out of range, nothing left out for "left_out".
    """

    def __init__(
        self,
        parts: Sequence[str],
        separator: str = "_",
        split: str = "all",
        fraction: float = 0.2,
        seed: int = 0,
        leave_out: str | Sequence[str] | None = None,
        only: Sequence[str] | None = None,
    ) -> None:
        if split not in SPLITS:
            raise ConfigError(f"reader.split={split}: expected one of {', '.join(SPLITS)}")
        if not 0 <= fraction <= 1:
            raise ConfigError(f"reader.fraction={fraction}: expected a share in 0..1, such as 0.2")
        if isinstance(parts, str) or not parts or not separator:
            raise ConfigError(f"reader.parts={parts}: expected a list of names, such as [colour, garment]")
        if only is not None and (isinstance(only, str) or not only or not set(only) <= set(parts)):
            raise ConfigError(f"reader.only={only}: expected null, or a list of some of the parts {list(parts)}")
        self.used = [place for place, part in enumerate(parts) if only is None or part in only]
        self.parts, self.separator, self.split, self.fraction, self.seed = parts, separator, split, fraction, seed
        self.left_out = [leave_out] if isinstance(leave_out, str) else list(leave_out or ())
        if split == "left_out" and not self.left_out:
            raise ConfigError("reader.split=left_out: no folder is left out; name one with leave_out")

    def read(self, spec: DatasetSpec, report: Sink) -> CocoData:
        """The images of the split, with `image_labels`; see `DatasetReader.read`.

        Faults: no folder of the name, no folder inside it, a folder whose name has another number of words than there
        are parts, a word in two parts, a folder without an image.
        """
        root = Path(spec.images)
        words = self._folders(root, spec.name, report)
        unknown = [name for name in self.left_out if name not in words]
        if unknown and words:
            hint = suggest(unknown[0], words) or f"; folders are {', '.join(words)}"
            raise ConfigError(f"dataset {spec.name!r}: leave_out names {unknown[0]!r}, which is no folder{hint}")
        vocabulary = self._vocabulary(words, spec.name, report)
        images = {name: _images(root / name) for name in words}
        for name in (name for name, paths in images.items() if not paths):
            text = f"{root / name}: the folder holds no image ({', '.join(IMAGE_SUFFIXES)}); put some in, or remove it"
            report(Fault("empty folder", f"dataset {spec.name!r}: {text}", str(root / name)))
        number = {path: place for place, path in enumerate((p for paths in images.values() for p in paths), 1)}
        chosen = [path for name, paths in images.items() for path in self._of_split(name, paths)]
        entries = [
            {
                **entry,
                "id": number[root / entry["file_name"]],
                VOCABULARY: [words[Path(entry["file_name"]).parts[0]][place] for place in self.used],
            }
            for entry in image_entries(root, chosen, report)
        ]
        return coco_data(root, entries, vocabularies={VOCABULARY: vocabulary}, notes=_left_aside(root, images))

    def _folders(self, root: Path, dataset: str, report: Sink) -> dict[str, list[str]]:
        """Folder -> its words, sorted by name; hidden folders do not count."""
        if not root.is_dir():
            report(Fault("image folder missing", f"dataset {dataset!r}: no image folder {root}", str(root)))
            return {}
        names = sorted(path.name for path in root.iterdir() if path.is_dir() and not path.name.startswith("."))
        example = self.separator.join(self.parts)
        if not names:
            text = f"{root}: no folder inside; expected folders named {example}"
            report(Fault("no folders", f"dataset {dataset!r}: {text}", str(root)))
        words: dict[str, list[str]] = {}
        for name in names:
            found = name.split(self.separator)
            if len(found) == len(self.parts) and all(found):
                words[name] = found
                continue
            text = (
                f"{root / name}: the folder's name has {len([word for word in found if word])} parts, expected "
                f"{len(self.parts)} ({example}); rename the folder, or set the reader's parts"
            )
            report(Fault("folder of other parts", f"dataset {dataset!r}: {text}", str(root / name)))
        return words

    def _vocabulary(self, words: dict[str, list[str]], dataset: str, report: Sink) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        for place in self.used:
            part = self.parts[place]
            for word in sorted({found[place] for found in words.values()}):
                if word in entries:
                    text = f"{word!r} is a {entries[word]['part']} and a {part}; labels need names that differ"
                    report(Fault("word in two parts", f"dataset {dataset!r}: {text}: rename folders"))
                entries.setdefault(word, {"name": word, "part": part})
        return list(entries.values())

    def _of_split(self, folder: str, paths: Sequence[Path]) -> list[Path]:
        """Those of a folder's images that the split holds, in order of name."""
        if (folder in self.left_out) != (self.split == "left_out"):
            return []
        if self.split in ("all", "left_out"):
            return list(paths)
        drawn = sorted(paths, key=lambda path: _draw(self.seed, f"{folder}/{path.name}"))
        val = set(drawn[: round(self.fraction * len(paths))])
        return [path for path in paths if (path in val) == (self.split == "val")]


def _images(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGE_SUFFIXES)


def _left_aside(root: Path, images: Mapping[str, Sequence[Path]]) -> tuple[str, ...]:
    """What lies in the folders and is no image by its name, further folders among it."""
    others = [
        str(path.relative_to(root))
        for folder, taken in images.items()
        for path in sorted(set((root / folder).iterdir()) - set(taken))
        if not path.name.startswith(".")
    ]
    if not others:
        return ()
    shown = ", ".join(others[:3]) + (", ..." if len(others) > 3 else "")
    return (f"{len(others)} entries of the folders are no {'/'.join(IMAGE_SUFFIXES)} files and left aside: {shown}",)


def _draw(seed: int, name: str) -> bytes:
    """The same on every machine and in every Python, unlike `hash`."""
    return hashlib.sha256(f"{seed}/{name}".encode()).digest()
