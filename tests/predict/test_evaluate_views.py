"""Evaluation under test-time augmentation: through the loaders, with the numbers of the network it stands for."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from networks import write_checkpoint
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.engine.evaluate import evaluate_checkpoint
from mtl_rcnn.predict import Predictor


def evaluated(checkpoint: Path, toy: Toy, folder: Path, *overrides: str) -> dict[str, list[dict]]:
    """Rows of the detector by image."""
    val = f"[{{name: toy, images: {toy.images}, annotations: {toy.boxes}, classes: [figure, disc]}}]"
    given = [f"run={checkpoint}", f"val={val}", f"output_dir={folder}", "device=cpu", *overrides]
    metrics = evaluate_checkpoint(compose("evaluate", given))
    assert "toy/detection/AP" in metrics
    rows: dict[str, list[dict]] = {}
    for row in json.loads((folder / "predictions" / "toy_detection.json").read_text()):
        rows.setdefault(f"{row['image_id']}.png", []).append(row)
    return rows


@pytest.mark.parametrize("workers", [0, 2])
def test_evaluation_predicts_as_the_predictor(toy: Toy, tmp_path: Path, workers: int) -> None:
    checkpoint = write_checkpoint(tmp_path / "network.pth", ["detection"])
    tta = {"scales": [48, 64], "flip": True}
    rows = evaluated(checkpoint, toy, tmp_path / "tta", "tta.scales=[48,64]", "tta.flip=true", f"workers={workers}")
    results = list(Predictor(checkpoint, tta=tta)(toy.images))
    assert len(results) == 6
    for result in results:
        mine = rows.get(result.name, [])
        assert [row["score"] for row in mine] == pytest.approx(result.scores.tolist())
        assert [row["bbox"][:2] for row in mine] == [pytest.approx(box[:2]) for box in result.boxes.tolist()]
    assert sum(map(len, rows.values())) > 20


def test_off_is_off(toy: Toy, tmp_path: Path) -> None:
    checkpoint = write_checkpoint(tmp_path / "network.pth", ["detection"])
    plain = evaluated(checkpoint, toy, tmp_path / "plain", "workers=0")
    assert evaluated(checkpoint, toy, tmp_path / "own", "tta.scales=[56]", "tta.max_size=80", "workers=0") == plain
    assert evaluated(checkpoint, toy, tmp_path / "flip", "tta.flip=true", "workers=0") != plain
