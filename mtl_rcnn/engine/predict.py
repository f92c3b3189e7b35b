"""Predictions on plain images, by a checkpoint or by an exported file, as drawings and COCO results."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from detectron2.data import detection_utils
from detectron2.data import transforms as T
from omegaconf import DictConfig, OmegaConf
from rich.progress import track

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Prediction
from mtl_rcnn.data.transforms import build_augmentations
from mtl_rcnn.engine.build import build_evaluators, build_targets
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.inference import evaluation_mode
from mtl_rcnn.evaluation.results import write_predictions
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN
from mtl_rcnn.runtime import ExportedNetwork
from mtl_rcnn.visualize.gallery import draw_prediction, write_image

logger = logging.getLogger(__name__)

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff")


@dataclass(frozen=True)
class Predictor:
    """A network as a function of an image.

    Attributes:
        predict: (H, W, 3) uint8 RGB -> prediction in the image's pixels, on the CPU.
        cfg, label_space: of the network.
        row_outputs: names of the outputs with one row per detection.
    """

    predict: Callable[[np.ndarray], Prediction]
    cfg: DictConfig
    label_space: LabelSpace
    row_outputs: tuple[str, ...]

    def confident(self, prediction: Prediction, threshold: float) -> Prediction:
        """The detections with at least this score; what is no row of a detection stays."""
        if "scores" not in prediction:
            return prediction
        keep = prediction["scores"] >= threshold
        return {name: value[keep] if name in self.row_outputs else value for name, value in prediction.items()}


def load_predictor(source: str | Path, device: str = "auto") -> Predictor:
    """A predictor from an exported `model.ts`, a checkpoint file or a run's directory."""
    chosen = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    if Path(source).suffix == ".ts":
        return _exported(Path(source), chosen)
    return checkpoint_predictor(restore(source, chosen))


def checkpoint_predictor(restored: Restored) -> Predictor:
    """A predictor of a restored network; images are prepared exactly as in evaluation."""
    return network_predictor(restored.model, restored.cfg, restored.label_space)


def network_predictor(model: MultiTaskRCNN, cfg: DictConfig, label_space: LabelSpace) -> Predictor:
    """A predictor of a network, also of one in training; images are prepared exactly as in evaluation."""
    augment = T.AugmentationList(build_augmentations(cfg.data.test_augment, "data.test_augment"))
    outputs = [output for task in model.tasks() for output in task.outputs()]

    def predict(image: np.ndarray) -> Prediction:
        given = T.AugInput(image)
        augment(given)
        pixels = given.image[:, :, ::-1] if cfg.model.input_format == "BGR" else given.image
        tensor = torch.as_tensor(np.ascontiguousarray(pixels.transpose(2, 0, 1)))
        with evaluation_mode(model):
            (prediction,) = model([{"image": tensor, "height": image.shape[0], "width": image.shape[1]}])
        return {name: value.cpu() for name, value in prediction.items()}

    rows = tuple(output.name for output in outputs if output.shape.startswith("(N"))
    return Predictor(predict, cfg, label_space, rows)


def predict_images(cfg: DictConfig) -> Path:
    """Predicts on images, from a configuration (`configs/predict.yaml`); returns the output directory.

    Raises:
        MtlRcnnError: a network or an image that cannot be read, or no image at all.
    """
    predictor = load_predictor(cfg.network, cfg.device)
    files = find_images(cfg.input)[: cfg.limit]
    folder = Path(cfg.output_dir)
    targets = build_targets(predictor.cfg, predictor.label_space)
    evaluators = build_evaluators(predictor.cfg, predictor.label_space, [])
    rows: dict[str, list[Any]] = {name: [] for name in evaluators}
    for path in track(files, description="predicting"):
        image = read_rgb(path)
        prediction = predictor.predict(image)
        record = {"image_id": path.name}
        for name, evaluator in evaluators.items():
            rows[name] += evaluator.rows(record, prediction)
        drawn = draw_prediction(
            image,
            predictor.confident(prediction, cfg.score_threshold),
            drawing_order(targets),
            predictor.label_space.classes,
        )
        write_image(folder / "drawings" / f"{path.stem}.png", drawn)
    for name, found in rows.items():
        write_predictions(folder, "images", name, found)
    (folder / "classes.json").write_text(json.dumps(list(predictor.label_space.classes)) + "\n", encoding="utf-8")
    print(f"{len(files)} images: drawings and predictions (category_id is the index in classes.json) in {folder}")
    return folder


def drawing_order(targets: Mapping[str, Any]) -> list[Any]:
    """Areas below, boxes with their labels on top."""
    return list(targets.values())[::-1]


def find_images(source: Any) -> list[Path]:
    """Image files of a file, a folder, or a list of both, in order of name."""
    found: list[Path] = []
    for entry in [source] if isinstance(source, str | Path) else OmegaConf.to_container(source):
        path = Path(entry)
        if not path.exists():
            raise ConfigError(f"input: {path} does not exist; expected an image, a folder of images, or a list of both")
        inside = sorted(file for file in path.iterdir() if file.suffix.lower() in SUFFIXES) if path.is_dir() else [path]
        if not inside:
            raise ConfigError(f"input: {path} holds no image ({', '.join(SUFFIXES)})")
        found += inside
    return found


def read_rgb(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 RGB, upright. Raises DataError naming a file that cannot be decoded."""
    try:
        return detection_utils.read_image(str(path), format="RGB")
    except Exception as error:  # decoders raise anything on damaged files
        raise DataError(f"{path}: the image cannot be decoded ({error})") from error


def _exported(path: Path, device: str) -> Predictor:
    if not path.is_file() or not path.with_name("manifest.json").is_file():
        raise ConfigError(f"network={path}: expected an exported model.ts with manifest.json beside it")
    network = ExportedNetwork(path, device)
    manifest = network.manifest

    def predict(image: np.ndarray) -> Prediction:
        tensor = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        return {name: value.cpu() for name, value in network(tensor).items()}

    rows = tuple(entry["name"] for entry in manifest["outputs"] if entry["shape"].startswith("(N"))
    return Predictor(
        predict, OmegaConf.create(manifest["config"]), LabelSpace.from_state(manifest["label_space"]), rows
    )


def image_of(sample: Mapping[str, Any], input_format: str) -> np.ndarray:
    """A sample's image as (H, W, 3) uint8 RGB."""
    image = sample["image"].permute(1, 2, 0).numpy()
    return np.ascontiguousarray(image[:, :, ::-1] if input_format == "BGR" else image)


def some_of(items: Sequence[Any], number: int) -> list[Any]:
    """`number` items spread evenly over a sequence, or all of a shorter one."""
    if len(items) <= number:
        return list(items)
    return [items[index * len(items) // number] for index in range(number)]
