"""Drawings of results: a picture per image, a video per video."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path, PurePosixPath
from types import TracebackType

import cv2
import numpy as np

from mtl_rcnn.errors import MtlRcnnError
from mtl_rcnn.predict.result import Result
from mtl_rcnn.predict.sources import frame_rate
from mtl_rcnn.visualize.gallery import write_image

_CODECS = {".avi": "MJPG"}
"""Ending -> codec; everything else becomes .mp4 with mp4v. OpenCV writes both without another library."""


class Drawings(AbstractContextManager):
    """Writes drawings into a folder under the names of their images. A context: leaving it ends the last video.

    Args:
        folder: where they go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._written: set[Path] = set()
        self._video: tuple[Path, _Video] | None = None

    def add(self, result: Result, drawn: np.ndarray) -> None:
        """Writes (H, W, 3) uint8 RGB. Frames of a video must follow each other."""
        if result.frame is None:
            write_image(self._path(result.name, ".png"), drawn)
            return
        if self._video is None or self._video[0] != result.path:
            self._end_video()
            suffix = result.path.suffix.lower()
            path = self._path(result.name.rpartition("#")[0], suffix if suffix in _CODECS else ".mp4")
            self._video = result.path, _Video(path, frame_rate(result.path), drawn.shape)
        self._video[1].add(drawn)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end_video()

    def _end_video(self) -> None:
        if self._video is not None:
            self._video[1].close()
            self._video = None

    def _path(self, name: str, suffix: str) -> Path:
        """A path within the folder, whatever the name; images that differ in their ending alone get two."""
        parts = [part for part in PurePosixPath(name).parts if part not in ("/", "..")]
        inside = self.folder.joinpath(*parts)
        path = inside.with_suffix(suffix)
        if path in self._written:
            path = inside.with_name(inside.name + suffix)
        self._written.add(path)
        return path


class _Video:
    """A video file of frames of one size, rounded up to even sides as the codecs want."""

    def __init__(self, path: Path, rate: float, shape: tuple[int, ...]) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._size = tuple(side + side % 2 for side in shape[:2])
        codec = cv2.VideoWriter_fourcc(*_CODECS.get(path.suffix, "mp4v"))
        self._writer = cv2.VideoWriter(str(path), codec, rate, self._size[::-1])
        if not self._writer.isOpened():
            raise MtlRcnnError(f"{path}: OpenCV cannot write this video of {self._size[1]} x {self._size[0]} pixels")

    def add(self, rgb: np.ndarray) -> None:
        down, right = (side - has for side, has in zip(self._size, rgb.shape))
        padded = np.pad(rgb, ((0, down), (0, right), (0, 0)), mode="edge") if down or right else rgb
        self._writer.write(cv2.cvtColor(padded, cv2.COLOR_RGB2BGR))

    def close(self) -> None:
        self._writer.release()
