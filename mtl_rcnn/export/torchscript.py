"""Writes `model.ts`, `manifest.json` and `runtime.py`: a network that runs with torch and torchvision alone."""

from __future__ import annotations

import json
import os
import shutil
import warnings
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn import runtime
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Prediction
from mtl_rcnn.errors import ExportError
from mtl_rcnn.export.certificate import Case, certify, choose_cases, one_by_one
from mtl_rcnn.export.devices import fixed_devices
from mtl_rcnn.export.manifest import build_manifest
from mtl_rcnn.export.scripting import script_network
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

METHODS = ("trace", "script")


class TracedNetwork(nn.Module):
    """The network as a function of one image: (image (3, H, W), size (2,)) -> its outputs in the manifest's order."""

    def __init__(self, model: MultiTaskRCNN, tasks: Collection[str] | None = None) -> None:
        super().__init__()
        self.network = InferenceNetwork(model, tasks)
        kept = [task for task in model.tasks() if task.name in self.network.names]
        self.names = [output.name for task in kept for output in task.outputs()]

    def forward(self, image: Tensor, size: Tensor) -> tuple[Tensor, ...]:
        """Predictions of one image in its original frame."""
        prediction = self.network([image], [size])[0]
        return tuple(prediction[name] for name in self.names)


def export_torchscript(
    model: MultiTaskRCNN,
    label_space: LabelSpace,
    images: Sequence[Tensor],
    folder: Path,
    preprocessing: Mapping[str, Any],
    origin: Mapping[str, Any],
    min_detections: int,
    method: str = "trace",
    tasks: Collection[str] | None = None,
) -> dict[str, Any]:
    """Traces or scripts the network, certifies the result against it, and writes the three files. Returns the
    manifest.

    Args:
        model: trained; left in evaluation mode.
        images: real (3, H, W) uint8 network-frame images for tracing and for the certificate, at least one.
        folder: where the files go; nothing is written unless the certificate holds.
        preprocessing: how an input is made of an image, for the manifest.
        origin: where the network comes from (configuration, versions, checkpoint), for the manifest.
        min_detections: see `choose_cases`.
        method: "trace" records the run of one image; "script" compiles the code, for any batch.
        tasks: names of the tasks to export; the heads of others are left out. None exports all.

    Raises:
        ExportError: the exported network differs from the network itself, the certificate lacks an input, or a task
            cannot be scripted.
        ConfigError: unknown or incomplete `tasks`.
    """
    if method not in METHODS:
        raise ExportError(f"export.method={method}: expected one of {', '.join(METHODS)}")
    if not images:
        raise ExportError("export needs at least one image to trace and certify the network with")
    network = InferenceNetwork(model.eval(), tasks).eval()
    cases = choose_cases(network, images, min_detections, batches=method == "script")
    module = _trace(TracedNetwork(model, tasks), cases[0]) if method == "trace" else script_network(model, network)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / ".model.ts.tmp"
    try:
        module.save(str(temporary))
        certificate = certify(network, _load(temporary, method, model, network.names), cases)
        manifest = build_manifest(model, network.names, label_space, method, preprocessing, origin)
        manifest |= {"fixed_devices": fixed_devices(module), "certificate": certificate}
        os.replace(temporary, folder / "model.ts")
    finally:
        temporary.unlink(missing_ok=True)
    (folder / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    shutil.copyfile(runtime.__file__, folder / "runtime.py")
    return manifest


def _load(
    path: Path, method: str, model: MultiTaskRCNN, tasks: Collection[str]
) -> Callable[[list[Tensor], list[Tensor]], list[Prediction]]:
    """The written file as a function of a batch."""
    module = torch.jit.load(str(path))
    if method == "script":
        return module
    names = [output.name for task in model.tasks() if task.name in tasks for output in task.outputs()]
    return one_by_one(names, module)


def _trace(network: TracedNetwork, case: Case) -> torch.jit.ScriptModule:
    with warnings.catch_warnings(), torch.no_grad():
        # Tracing warns of every Python number it meets; the certificate shows whether one of them mattered.
        warnings.simplefilter("ignore")
        return torch.jit.trace(network.eval(), (case.images[0], case.sizes[0]), check_trace=False)
