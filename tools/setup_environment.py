"""Installs requirements.txt into the Python that runs this, keeping an official Detectron2 that is already there.
Used by `make setup`."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
OURS = "+pure"
"""In the version of the Detectron2 that third_party/detectron2 builds."""


def main() -> None:
    """Runs pip; its own output is the progress."""
    lines = (ROOT / "requirements.txt").read_text(encoding="utf-8").splitlines()
    official = official_detectron2()
    if official is not None:
        print(f"keeping the installed Detectron2 {official}")
        lines = [line for line in lines if "third_party/detectron2" not in line]
    with tempfile.NamedTemporaryFile("w", suffix=".txt", dir=ROOT) as chosen:
        chosen.write("\n".join(lines) + "\n")
        chosen.flush()
        command = [sys.executable, "-m", "pip", "install", "--disable-pip-version-check", "-r", chosen.name]
        sys.exit(subprocess.run(command, cwd=ROOT, check=False).returncode)


def official_detectron2() -> str | None:
    """Version of an installed Detectron2 that is not ours; None if there is none."""
    try:
        version = importlib.metadata.version("detectron2")
    except importlib.metadata.PackageNotFoundError:
        return None
    return None if OURS in version else version


if __name__ == "__main__":
    main()
