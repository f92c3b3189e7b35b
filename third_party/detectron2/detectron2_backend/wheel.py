"""From files to a wheel: layout, metadata, change notice, and a zip whose bytes depend on nothing but its content."""

from __future__ import annotations

import base64
import hashlib
import zipfile
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT: dict = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
STEM = f"{PROJECT['name']}-{PROJECT['version']}"
DIST_INFO = f"{STEM}.dist-info"
FILE_NAME = f"{STEM}-py3-none-any.whl"

WHEEL = """Wheel-Version: 1.0
Generator: detectron2_backend
Root-Is-Purelib: true
Tag: py3-none-any
"""


def metadata() -> str:
    """The METADATA file, from the [project] table of pyproject.toml."""
    lines = [
        "Metadata-Version: 2.4",
        f"Name: {PROJECT['name']}",
        f"Version: {PROJECT['version']}",
        f"Summary: {PROJECT['description']}",
        *(f"Project-URL: {label}, {url}" for label, url in PROJECT["urls"].items()),
        f"License-Expression: {PROJECT['license']}",
        "License-File: LICENSE",
        "License-File: CHANGES",
        f"Requires-Python: {PROJECT['requires-python']}",
        *(f"Requires-Dist: {requirement}" for requirement in PROJECT["dependencies"]),
    ]
    return "\n".join(lines) + "\n"


def write_wheel(files: dict[str, bytes], folder: Path) -> str:
    """Write `files` (path in site-packages -> content) plus RECORD as a wheel into `folder`; returns its file name."""
    record = "".join(f"{path},sha256={_digest(content)},{len(content)}\n" for path, content in sorted(files.items()))
    record_path = f"{DIST_INFO}/RECORD"
    with zipfile.ZipFile(folder / FILE_NAME, "w") as archive:
        for path, content in [*sorted(files.items()), (record_path, f"{record}{record_path},,\n".encode())]:
            # Fixed date and mode, no compression (zlib's output differs between its versions): the same content gives
            # the same bytes on every machine and day.
            entry = zipfile.ZipInfo(path, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, content, zipfile.ZIP_STORED)
    return FILE_NAME


def _digest(content: bytes) -> str:
    return base64.urlsafe_b64encode(hashlib.sha256(content).digest()).rstrip(b"=").decode()
