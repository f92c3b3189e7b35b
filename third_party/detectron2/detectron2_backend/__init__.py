"""PEP 517 build backend: Detectron2's source release in, a pure-Python wheel out.

    sdist.py          fetch by hash, or read the local copy
    substitutions.py  the edits, one table
    package.py        which file goes where, change notice
    wheel.py          metadata and the zip

Installers call the three hooks below and nothing else. There is no editable install and no source distribution: the
source is the release on the package index.
"""

from __future__ import annotations

from pathlib import Path

from .package import package_files
from .sdist import DOWNLOADER, read_local_copy, read_release
from .wheel import DIST_INFO, WHEEL, metadata, write_wheel


def get_requires_for_build_wheel(config_settings: dict | None = None) -> list[str]:
    """The downloader; nothing for a local copy, which is checked already here, before pip downloads anything."""
    return [] if read_local_copy() else [DOWNLOADER]


def prepare_metadata_for_build_wheel(metadata_directory: str, config_settings: dict | None = None) -> str:
    """Write the metadata, which needs no download; returns the name of its folder."""
    folder = Path(metadata_directory) / DIST_INFO
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "METADATA").write_text(metadata(), encoding="utf-8", newline="\n")
    (folder / "WHEEL").write_text(WHEEL, encoding="utf-8", newline="\n")
    return folder.name


def build_wheel(
    wheel_directory: str, config_settings: dict | None = None, metadata_directory: str | None = None
) -> str:
    """Write the wheel into `wheel_directory`; returns its file name."""
    return write_wheel(package_files(read_release()), Path(wheel_directory))
