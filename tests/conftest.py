"""Fixtures that all tests share."""

from __future__ import annotations

import os
from pathlib import Path

# Tests run side by side: threads of their own would only wait for each other. Set before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
from toy import Toy, write_toy


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    """A tiny COCO dataset of this test's own, free to be spoilt."""
    return write_toy(tmp_path / "toy")


@pytest.fixture(scope="session")
def coco_mini() -> Path:
    """Folder of 120 real COCO images; tests that need it are skipped where it is absent."""
    default = Path(__file__).parents[1] / ".." / "shared" / "data"
    folder = Path(os.environ.get("MTL_RCNN_DATA", default)) / "coco_mini"
    if not folder.is_dir():
        pytest.skip(f"no real data in {folder}; set MTL_RCNN_DATA to the folder that holds coco_mini")
    return folder
