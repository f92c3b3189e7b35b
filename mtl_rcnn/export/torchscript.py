"""Writes `model.ts`, `manifest.json` and `runtime.py`: a network that runs with torch and torchvision alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn import runtime
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import ExportError
from mtl_rcnn.export.certificate import as_prediction, certify, choose_cases
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

MANIFEST_FORMAT = 1

INPUTS = [
    {
        "name": "image",
        "shape": "(3, H, W)",
        "dtype": "uint8",
        "meaning": "one image, resized as `preprocessing` says, channels in its order, values 0..255; any H and W",
    },
    {
        "name": "size",
        "shape": "(2,)",
        "dtype": "int64",
        "meaning": "height and width of the original image in pixels: the frame of all outputs",
    },
]


class TracedNetwork(nn.Module):
    """The network as a function of one image: (image (3, H, W), size (2,)) -> its outputs in the manifest's order."""

    def __init__(self, model: MultiTaskRCNN) -> None:
        super().__init__()
        self.model = model
        self.names = [output.name for task in model.tasks() for output in task.outputs()]

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Predictions of one image in its original frame."""
        prediction = self.model.predict_tensors([image], [size])[0]
        return tuple(prediction[name] for name in self.names)


def export_torchscript(
    model: MultiTaskRCNN,
    label_space: LabelSpace,
    images: Sequence[Tensor],
    folder: Path,
    preprocessing: Mapping[str, Any],
    origin: Mapping[str, Any],
    min_detections: int,
) -> dict[str, Any]:
    """Traces the network, certifies the result against it, and writes the three files. Returns the manifest.

    Args:
        model: trained; left in evaluation mode.
        images: real (3, H, W) uint8 network-frame images for tracing and for the certificate, at least one.
        folder: where the files go; nothing is written unless the certificate holds.
        preprocessing: how an input is made of an image, for the manifest.
        origin: where the network comes from (configuration, versions, checkpoint), for the manifest.
        min_detections: see `choose_cases`.

    Raises:
        ExportError: the traced network differs from the network itself, or the certificate lacks an input.
    """
    if not images:
        raise ExportError("export needs at least one image to trace and certify the network with")
    network = TracedNetwork(model.eval())

    def eager(image: Tensor, size: Tensor) -> Any:
        return as_prediction(network.names, network(image, size))

    cases = choose_cases(eager, images, min_detections)
    traced = _trace(network, cases[0].image, cases[0].size)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.ts.tmp"
    try:
        traced.save(str(temporary))
        loaded = torch.jit.load(str(temporary))
        certificate = certify(eager, lambda image, size: as_prediction(network.names, loaded(image, size)), cases)
        manifest = build_manifest(model, label_space, preprocessing, origin) | {"certificate": certificate}
        os.replace(temporary, folder / "model.ts")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(runtime.__file__, folder / "runtime.py")
    return manifest


def build_manifest(
    model: MultiTaskRCNN, label_space: LabelSpace, preprocessing: Mapping[str, Any], origin: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything a user of `model.ts` must know, as plain JSON values."""
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "inputs": INPUTS,
        "outputs": [
            {"name": o.name, "shape": o.shape, "dtype": o.dtype, "meaning": o.meaning, "task": task.name}
            for task in model.tasks()
            for o in task.outputs()
        ],
        "classes": list(label_space.classes),
        "preprocessing": dict(preprocessing),
        "label_space": label_space.state(),
        **origin,
    }
    for task in model.tasks():
        manifest |= task.manifest()
    return manifest


def _trace(network: TracedNetwork, image: Tensor, size: Tensor) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(), torch.no_grad():
        # Tracing warns of every Python number it meets; the certificate shows whether one of them mattered.
        warnings.simplefilter("ignore")
        return torch.jit.trace(network, (image, size), check_trace=False)
