"""Predicts from a configuration: files of results and drawings. `tools/predict.py` and tests call it."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine.build import build_evaluators
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.run import setup_logging
from mtl_rcnn.errors import DataError
from mtl_rcnn.predict.drawings import Drawings
from mtl_rcnn.predict.files import ResultFiles
from mtl_rcnn.predict.predictor import Predictor
from mtl_rcnn.predict.result import Result

_SHOWN = 10


def predict_images(cfg: DictConfig) -> Path:
    """Predicts on images and videos (`configs/predict.yaml`); returns the output directory.

    Raises:
        MtlRcnnError: a network that cannot be read, an image that cannot be read (`on_error`), or no image at all.
            What was computed before is written.
    """
    setup_logging(None, Ranks(0, 1, 0, torch.device("cpu")))
    folder = Path(cfg.output_dir)
    predictor = _predictor(cfg)
    given = OmegaConf.to_container(cfg.input) if OmegaConf.is_config(cfg.input) else cfg.input
    results = predictor(given, cfg.limit)
    evaluators = build_evaluators(predictor.cfg, predictor.label_space, [])
    evaluators = {name: evaluators[name] for name in predictor.targets}
    number = 0
    with ExitStack() as stack:
        files = stack.enter_context(ResultFiles(folder, list(evaluators), cfg.format))
        drawings = stack.enter_context(Drawings(folder / "drawings"))
        classes = json.dumps(list(predictor.label_space.classes)) + "\n"
        (folder / "classes.json").write_text(classes, encoding="utf-8")
        for result in results:
            number += 1
            record = {"image_id": result.name}
            rows = {name: evaluator.rows(record, result.outputs) for name, evaluator in evaluators.items()}
            files.add(_image(result), rows)
            if cfg.draw:
                scale = None if result.frame is None else 1.0  # a video keeps its size
                drawings.add(result, predictor.draw(result, cfg.score_threshold, scale))
    _say(predictor, number, folder, cfg)
    return folder


def _predictor(cfg: DictConfig) -> Predictor:
    return Predictor(
        cfg.network,
        cfg.device,
        None if cfg.only_tasks is None else list(cfg.only_tasks),
        batch_size=cfg.batch_size,
        workers=cfg.workers,
        on_error=cfg.on_error,
        progress=True,
        tta=OmegaConf.to_container(cfg.tta),
    )


def _image(result: Result) -> dict[str, Any]:
    height, width = result.image.shape[:2]
    file = None if result.path is None else str(result.path)
    return {"id": result.name, "file_name": file, "frame": result.frame, "width": width, "height": height}


def _say(predictor: Predictor, number: int, folder: Path, cfg: DictConfig) -> None:
    skipped = predictor.skipped
    if skipped:
        names = ", ".join(entry.name for entry in skipped[:_SHOWN]) + (" ..." if len(skipped) > _SHOWN else "")
        print(f"{len(skipped)} images could not be read and are left out: {names}")
    if number == 0:
        raise DataError(
            f"input={cfg.input}: none of {len(skipped)} images could be read; the first: {skipped[0].reason}"
        )
    drawn = "drawings and predictions" if cfg.draw else "predictions"
    print(f"{number} images: {drawn} (category_id is the index in classes.json) in {folder}")
