"""Exports a checkpoint from a configuration. `tools/export_model.py` and tests call it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine.data import build_mapper, val_datasets
from mtl_rcnn.engine.restore import Restored, restore
from mtl_rcnn.engine.run import versions
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.results import read_thresholds
from mtl_rcnn.export.onnx_file import export_onnx
from mtl_rcnn.export.torchscript import export_torchscript
from mtl_rcnn.export.weights_file import NAME, export_weights
from mtl_rcnn.modeling.inference import chosen_tasks


def export_checkpoint(cfg: DictConfig) -> dict[str, Any]:
    """Exports, certifies and writes the network of `cfg.run`; returns the manifest. Prints the certificate.

    Weights alone (`export.method=safetensors`) are copied rather than compiled: there is nothing to certify, and what
    the file says of them is returned.

    Raises:
        MtlRcnnError: the checkpoint or its evaluation set cannot be read, or the certificate fails.
    """
    restored = restore(cfg.run, "cpu", cfg.checkpoint)
    tasks = None if cfg.export.tasks is None else list(cfg.export.tasks)
    folder = Path(cfg.output_dir) if cfg.output_dir else restored.path.parent
    config = _config_of(restored, tasks)
    if cfg.export.method == "safetensors":
        told = export_weights(restored, folder, config, tasks)
        print(f"wrote {NAME} in {folder}")
        return told
    origin = {
        "checkpoint": {"file": restored.path.name, "iteration": restored.iteration},
        "versions": versions(),
        "config": config,
        "score_thresholds": score_thresholds(restored),
    }
    images = _images(restored, cfg.certificate.images)
    what = (restored.model, restored.label_space, images, folder, preprocessing(restored.cfg), origin)
    if cfg.export.method == "onnx":
        manifest = export_onnx(*what, cfg.certificate.min_detections, tasks)
    else:
        manifest = export_torchscript(*what, cfg.certificate.min_detections, cfg.export.method, tasks)
    _report(manifest, folder)
    return manifest


def _report(manifest: Mapping[str, Any], folder: Path) -> None:
    for case in manifest["certificate"]:
        worst, rows = max(case["differences"].values()), " + ".join(map(str, case["rows"]))
        print(f"certificate, {case['case']}: {rows} rows, largest difference {worst:.3g}")
    for place in manifest.get("fixed_devices", ()):
        print(f"this file runs on the CPU alone: its graph holds {place}")
    onnx = manifest["method"] == "onnx"
    files = ("model.onnx", "model.onnx.json") if onnx else ("model.ts", "manifest.json", "runtime.py")
    print(f"wrote {', '.join(files)} in {folder}")


def score_thresholds(restored: Restored) -> dict[str, Any]:
    """{dataset: {task: {class: score of highest F1}}} as measured on this very network by `tools/evaluate.py`, else at
    the end of its training; {} if neither evaluated it."""
    run = restored.path.parent
    return read_thresholds(run / "evaluation", restored.iteration) or read_thresholds(run, restored.iteration)


def preprocessing(cfg: DictConfig) -> dict[str, Any]:
    """How the exported network's input is made of an image: the test augmentation in words that `runtime.py` can
    follow.

    Raises:
        ConfigError: a test augmentation other than one resize, of the shortest edge or to a fixed size.
    """
    steps = [step for step in OmegaConf.to_container(cfg.data.test_augment, resolve=True).values() if step is not None]
    common = {"channel_order": cfg.model.input_format, "values": [0, 255], "interpolation": "bilinear, antialiased"}
    rule = {"short_edge": None, "max_size": None, "size": None}
    kind = steps[0]["_target_"].rpartition(".")[2] if len(steps) == 1 else ""
    if kind == "ResizeShortestEdge":
        rule |= {"short_edge": _single(steps[0]["short_edge_length"]), "max_size": steps[0]["max_size"]}
    elif kind == "Resize":
        shape = steps[0]["shape"]
        rule["size"] = [shape, shape] if isinstance(shape, int) else list(shape)
    elif steps:
        raise ConfigError(
            "data.test_augment: an exported network can only be given one ResizeShortestEdge or Resize, found "
            f"{[step['_target_'] for step in steps]}"
        )
    return {**rule, **common}


def _config_of(restored: Restored, tasks: Sequence[str] | None) -> dict[str, Any]:
    """The training configuration, of the exported tasks alone."""
    config = OmegaConf.to_container(restored.cfg, resolve=True)
    kept = chosen_tasks(restored.model, tasks)
    return {**config, "tasks": {name: node for name, node in config["tasks"].items() if name in kept}}


def _single(length: Any) -> int:
    lengths = [length] if isinstance(length, int) else list(length)
    if len(set(lengths)) != 1:
        raise ConfigError(f"data.test_augment: short_edge_length={lengths} is random; give one length to export")
    return lengths[0]


def _images(restored: Restored, number: int) -> list[Any]:
    datasets = val_datasets(restored.cfg, restored.label_space)
    if not datasets:
        raise ConfigError("the run has no evaluation set to certify the exported network on")
    mapper = build_mapper(restored.cfg, {}, training=False)
    records: list[Mapping[str, Any]] = datasets[0].records[:number]
    return [mapper(record, index)["image"] for index, record in enumerate(records)]
