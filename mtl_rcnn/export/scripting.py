"""Scripting: the whole inference network compiled, loops and branches included; any batch, any size."""

from __future__ import annotations

import re
import warnings

import detectron2.export  # noqa: F401 (tells TorchScript how Detectron2's ResNet and FPN are to be read)
import torch

from mtl_rcnn.errors import ExportError
from mtl_rcnn.modeling.inference import InferenceNetwork
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

TRUNK = "the trunk"


def script_network(model: MultiTaskRCNN, network: InferenceNetwork) -> torch.jit.ScriptModule:
    """Compiles `network`, which is over the layers of `model`.

    Raises:
        ExportError: TorchScript refuses something; names the task, what it refuses, file and line.
    """
    try:
        return _script(network)
    except Exception as error:  # TorchScript's refusals have no common class
        raise _explain(model, network.names, error) from error


def _script(network: torch.nn.Module) -> torch.jit.ScriptModule:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # "torch.jit.script is deprecated"
        warnings.simplefilter("ignore", DeprecationWarning)
        return torch.jit.script(network.eval())


def _explain(model: MultiTaskRCNN, names: list[str], error: Exception) -> ExportError:
    culprit = _find_culprit(model, names)
    others = [name for name in names if name != culprit]
    away = f" or leave it out: export.tasks=[{','.join(others)}]" if culprit in names and others else ""
    return ExportError(
        f"export.method=script: {culprit} cannot be scripted: {_reason(error)}; use export.method=trace{away}"
    )


def _find_culprit(model: MultiTaskRCNN, names: list[str]) -> str:
    """The first part that cannot be scripted, alone or with the detector under it. Only that it fails counts: once
    refused, TorchScript gives another reason."""
    detector = [] if model.roi_heads is None else [model.roi_heads.detector.name]
    on_boxes = [] if model.roi_heads is None else list(model.roi_heads.tasks)
    parts = [(TRUNK, model.backbone)]
    parts += [(name, InferenceNetwork(model, [name, *(detector if name in on_boxes else [])])) for name in names]
    for name, part in parts:
        try:
            _script(part)
        except Exception:  # whatever it is, it is reported as the first refusal
            return name
    return "the network"


def _reason(error: Exception) -> str:
    """TorchScript's complaint on one line: what, the source that it points at, file and line."""
    text = str(error)
    where = re.search(r'File "([^"]+)", line (\d+)', text)
    complaint = " ".join(text[: where.start()].split()) if where else " ".join(text.split())
    pointed = re.search(r"^(?P<source>.*)\n(?P<marks>\s*~+)\s*<--- HERE", text, flags=re.MULTILINE)
    op = ""
    if pointed:
        marks = pointed["marks"]
        op = pointed["source"][marks.index("~") : len(marks)].strip()
        op = op if len(op) > 1 else pointed["source"].strip()  # a bracket says nothing
    return f"{complaint.rstrip(': ')}" + (f" at `{op}`" if op else "") + (f", {where[1]}:{where[2]}" if where else "")
