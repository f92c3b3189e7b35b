"""Files that are there whole or not at all, and what is said when the disk takes no more."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

__all__ = ["cannot_write", "write_atomically"]


def write_atomically(path: Path, write: Callable[[BinaryIO], Any]) -> None:
    """Calls `write` on a temporary file beside `path`, forces it to the disk, and renames it.

    Raises:
        OSError: of the disk. `path` is as it was, and the temporary file is gone.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def cannot_write(path: Path, error: OSError, needed: int | None = None) -> str:
    """Why a file could not be written, in words: the system's reason, the bytes needed and free."""
    try:
        free = f"{shutil.disk_usage(path.parent).free} bytes are free"
    except OSError:  # the folder itself is gone
        free = "its folder cannot be reached"
    need = "" if needed is None else f"it takes about {needed} bytes, "
    return f"cannot be written ({error.strerror or error}; {need}{free})"
