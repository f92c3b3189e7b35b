"""Features of a trunk that does not change, computed once per image."""

from __future__ import annotations

import hashlib
import logging
import os
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from detectron2.modeling.backbone import Backbone
from detectron2.structures import ImageList
from torch import Tensor
from torch.nn import functional as F

from mtl_rcnn.modeling.slots import Features

_log = logging.getLogger(__name__)


class FeatureStore(Protocol):
    """Key -> features of one image on the CPU, {level: (1, C, H, W)}; a dict is one."""

    def get(self, key: str) -> Features | None:
        """The features, None if there are none."""

    def __setitem__(self, key: str, features: Features) -> None: ...


class FeatureCache:
    """The trunk's features of a batch; of images that were seen before, without the trunk.

    An image is known by its pixels as they come from the loader, so that another crop or flip, another size or a file
    that has changed is another image. `view` stands for all else that features follow from: the trunk's weights above
    all. So what is found always belongs to what is asked for.

    Each image goes through the trunk alone, padded to a multiple of `size_divisibility`: its features do not depend on
    the batch that it came in, and a resumed run has the same. In a batch of images of one size they are those of the
    trunk, to the rounding of a batch of another length. In a batch of several sizes maps are padded with zeros after
    the trunk, where without a cache images are padded with zeros before it: features in the padding differ, and those
    next to it as far as the trunk sees.

    Args:
        trunk: without anything that learns or draws.
        view: of the trunk's weights and of what happens to pixels before they come to it.
        store: of features of every image by key.
    """

    def __init__(self, trunk: Backbone, view: bytes, store: FeatureStore) -> None:
        self.trunk, self.view, self.store = trunk, view, store
        self._told = False

    def __call__(self, pixels: Sequence[Tensor], images: ImageList) -> Features:
        """Features of a batch, {level: (B, C, H, W)}, without gradients.

        Args:
            pixels: (3, H_i, W_i) per image, as they come from the loader.
            images: the same, normalised and on the trunk's device.
        """
        computed = _arithmetic(images.device.type)
        entries = [self._features(self._key(image, computed), images[index]) for index, image in enumerate(pixels)]
        return {level: _joined([entry[level] for entry in entries]).to(images.device) for level in entries[0]}

    def _key(self, pixels: Tensor, computed: str) -> str:
        digest = hashlib.blake2b(self.view, digest_size=20)
        digest.update(f"{computed} {pixels.dtype} {tuple(pixels.shape)}".encode())
        digest.update(pixels.contiguous().cpu().numpy())
        return digest.hexdigest()

    def _features(self, key: str, image: Tensor) -> Features:
        found = self.store.get(key)
        if found is None:
            with torch.no_grad():
                levels = self.trunk(ImageList.from_tensors([image], self.trunk.size_divisibility).tensor)
            found = self.store[key] = {name: level.to("cpu", copy=True) for name, level in levels.items()}
            self._tell(found)
        return found

    def _tell(self, features: Features) -> None:
        if not self._told:
            size = sum(level.numel() * level.element_size() for level in features.values())
            _log.info("features are kept: the first image's take %.1f MB", size / 1e6)
            self._told = True


class FolderStore:
    """Features in a folder, a file per image, that ranks and runs may share.

    A file is written under a name of its own and renamed: whoever opens it finds all of it.

    Args:
        folder: made if missing.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def get(self, key: str) -> Features | None:
        """The features, None if there are none, or none that can be read."""
        path = self._path(key)
        if not path.is_file():
            return None
        try:
            return torch.load(path, map_location="cpu", weights_only=True)
        except Exception as error:  # a damaged archive can fail in any way
            _log.warning("%s: cannot be read (%s); the features are computed anew", path, type(error).__name__)
            return None

    def __setitem__(self, key: str, features: Features) -> None:
        path = self._path(key)
        path.parent.mkdir(exist_ok=True)
        temporary = path.with_name(f".{key}.{uuid.uuid4().hex}.tmp")
        try:
            torch.save(features, temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)

    def _path(self, key: str) -> Path:
        return self.folder / key[:2] / f"{key}.pt"


def _arithmetic(device: str) -> str:
    """The device, and the type that autocast computes in if it is on: a half is not to be found in place of a
    float."""
    return f"{device} {torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else torch.float32}"


def _joined(maps: Sequence[Tensor]) -> Tensor:
    """(1, C, H_i, W_i) each -> (B, C, H, W), with zeros below and to the right of the smaller ones."""
    height, width = (max(entry.shape[side] for entry in maps) for side in (-2, -1))
    padded = [F.pad(entry, (0, width - entry.shape[-1], 0, height - entry.shape[-2])) for entry in maps]
    return torch.cat(padded)
