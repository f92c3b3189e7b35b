"""Writes `model.onnx` and `model.onnx.json`: detections of fixed number, for onnxruntime and what reads ONNX."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Prediction
from mtl_rcnn.errors import ExportError
from mtl_rcnn.export.certificate import certify, choose_cases
from mtl_rcnn.export.manifest import build_manifest
from mtl_rcnn.export.onnx_network import COMMON, FixedNetwork
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

OPSET = 18
BOX_TOLERANCE = 1e-2
"""In pixels of the original image. Another runtime's convolutions round otherwise than torch's (docs/export.md)."""

GRID_TOLERANCE = 1e-3
"""Of what RoI tasks give, which pool at boxes that already differ. Scores keep 1e-4."""

Batch = tuple[Tensor, Tensor, Tensor]


def export_onnx(
    model: MultiTaskRCNN,
    label_space: LabelSpace,
    images: Sequence[Tensor],
    folder: Path,
    preprocessing: Mapping[str, Any],
    origin: Mapping[str, Any],
    min_detections: int,
    tasks: Collection[str] | None = None,
) -> dict[str, Any]:
    """Writes the network as ONNX, certified in onnxruntime against the network itself. Returns the manifest.

    Arguments as of `export_torchscript`.

    Raises:
        ExportError: onnx or onnxruntime is missing, a task has no fixed form, or the file differs from the network.
        ConfigError: unknown or incomplete `tasks`.
    """
    need_onnx()
    network, fixed = InferenceNetwork(model.eval(), tasks).eval(), FixedNetwork(model, tasks).eval()
    cases = choose_cases(network, images, min_detections, batches=True)
    divisor = network.size_divisibility
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.onnx.tmp"
    try:
        example = pad_batch(cases[-1].images, cases[-1].sizes, divisor)
        shapes = _write(fixed, example, temporary)
        tolerances = dict.fromkeys(fixed.names[len(COMMON) :], GRID_TOLERANCE) | {"boxes": BOX_TOLERANCE}
        found = _in_onnxruntime(temporary, fixed.names, divisor)
        certificate = certify(_eager(network, fixed), found, cases, tolerances)
        manifest = build_manifest(model, network.names, label_space, "onnx", preprocessing, origin)
        manifest |= {"size_divisibility": divisor, "outputs": shapes, "certificate": certificate, "opset": OPSET}
        os.replace(temporary, folder / "model.onnx")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "model.onnx.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    return manifest


def need_onnx() -> None:
    """ExportError if onnx or onnxruntime is not installed."""
    try:
        import onnx  # noqa: F401
        import onnxruntime  # noqa: F401
    except ImportError as error:
        raise ExportError(f"export.method=onnx needs {error.name}: pip install 'mtl-rcnn[onnx]'") from error


def pad_batch(images: Sequence[Tensor], sizes: Sequence[Tensor], divisor: int) -> Batch:
    """The inputs of `model.onnx`: images (B, 3, H, W) uint8, network_sizes (B, 2), sizes (B, 2)."""
    network_sizes = torch.tensor([list(image.shape[-2:]) for image in images])
    height, width = ((network_sizes.max(dim=0).values + divisor - 1) // divisor * divisor).tolist()
    padded = torch.zeros(len(images), 3, height, width, dtype=torch.uint8)
    for frame, image in zip(padded, images):
        frame[:, : image.shape[-2], : image.shape[-1]] = image
    return padded, network_sizes, torch.stack(list(sizes))


@torch.no_grad()
def _write(fixed: FixedNetwork, example: Batch, path: Path) -> list[dict[str, str]]:
    """Writes the file; returns its outputs for the manifest."""
    outputs = fixed(*example)
    free = {0: "B"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # tracing warns of every Python number; the certificate shows which mattered
        torch.onnx.export(
            fixed,
            example,
            str(path),
            dynamo=False,  # torch.export refuses what depends on data: see docs/export.md
            opset_version=OPSET,
            input_names=["images", "network_sizes", "sizes"],
            output_names=fixed.names,
            dynamic_axes={"images": {0: "B", 2: "H", 3: "W"}, "network_sizes": free, "sizes": free}
            | dict.fromkeys(fixed.names, free),
        )
    return [
        {"name": name, "shape": f"({', '.join(['B', *map(str, value.shape[1:])])})", "dtype": str(value.dtype)[6:]}
        for name, value in zip(fixed.names, outputs)
    ]


def _eager(network: InferenceNetwork, fixed: FixedNetwork) -> Callable[..., list[Prediction]]:
    """The network's own boxes, scores and classes, with the grids of the fixed form."""

    def of_batch(images: list[Tensor], sizes: list[Tensor]) -> list[Prediction]:
        outputs = fixed(*pad_batch(images, sizes, network.size_divisibility))
        grids = _split(fixed.names, outputs)
        own = [{name: one[name] for name in COMMON[1:]} for one in network(images, sizes)]
        return [{**mine, **theirs} for mine, theirs in zip(grids, own)]

    return of_batch


def _in_onnxruntime(path: Path, names: Sequence[str], divisor: int) -> Callable[..., list[Prediction]]:
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])

    def of_batch(images: list[Tensor], sizes: list[Tensor]) -> list[Prediction]:
        inputs = [entry.name for entry in session.get_inputs()]
        values = [value.numpy() for value in pad_batch(images, sizes, divisor)]
        return _split(names, [torch.from_numpy(value) for value in session.run(None, dict(zip(inputs, values)))])

    return of_batch


def _split(names: Sequence[str], outputs: Sequence[Tensor]) -> list[Prediction]:
    """Per image, the rows that hold something."""
    by_name = dict(zip(names, outputs, strict=True))
    counts = by_name.pop("count").tolist()
    return [{name: value[index, :count] for name, value in by_name.items()} for index, count in enumerate(counts)]
