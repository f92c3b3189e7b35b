"""The manifest of an exported network: everything that its user must know, as plain JSON values."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

MANIFEST_FORMAT = 3
"""2 adds `method`, `signature`, `tasks` and `fixed_devices`; readers of format 1 take `method` for "trace". 3 adds
`preprocessing.size`, [height, width] of every input, or null where `short_edge` and `max_size` say it."""

SIGNATURES = {
    "onnx": "see `inputs` and `outputs`; B, H and W are free, K is the largest number of detections",
    "trace": "forward(image: Tensor, size: Tensor) -> Tuple[Tensor, ...], in the order of `outputs`",
    "script": "forward(images: List[Tensor], sizes: List[Tensor]) -> List[Dict[str, Tensor]], names as in `outputs`",
}

_IMAGE = "resized as `preprocessing` says, channels in its order, values 0..255; any H and W"
_SIZE = "height and width of the original image in pixels: the frame of all outputs"
INPUTS = {
    "onnx": [
        {
            "name": "images",
            "shape": "(B, 3, H, W)",
            "dtype": "uint8",
            "meaning": "images, resized as `preprocessing` says, channels in its order, values 0..255, each in the "
            "upper left corner, 0 elsewhere; H and W are multiples of `size_divisibility`",
        },
        {"name": "network_sizes", "shape": "(B, 2)", "dtype": "int64", "meaning": "height and width without padding"},
        {"name": "sizes", "shape": "(B, 2)", "dtype": "int64", "meaning": _SIZE},
    ],
    "trace": [
        {"name": "image", "shape": "(3, H, W)", "dtype": "uint8", "meaning": f"one image, {_IMAGE}"},
        {"name": "size", "shape": "(2,)", "dtype": "int64", "meaning": _SIZE},
    ],
    "script": [
        {"name": "images", "shape": "B x (3, H, W)", "dtype": "uint8", "meaning": f"a list of images, each {_IMAGE}"},
        {"name": "sizes", "shape": "B x (2,)", "dtype": "int64", "meaning": f"a list, for each image {_SIZE}"},
    ],
}


def build_manifest(
    model: MultiTaskRCNN,
    tasks: Collection[str],
    label_space: LabelSpace,
    method: str,
    preprocessing: Mapping[str, Any],
    origin: Mapping[str, Any],
) -> dict[str, Any]:
    """Inputs, outputs, classes, preprocessing and origin of an exported network with these tasks."""
    kept = [task for task in model.tasks() if task.name in tasks]
    manifest: dict[str, Any] = {
        "format": MANIFEST_FORMAT,
        "method": method,
        "signature": SIGNATURES[method],
        "tasks": [task.name for task in kept],
        "inputs": INPUTS[method],
        "outputs": [
            {"name": o.name, "shape": o.shape, "dtype": o.dtype, "meaning": o.meaning, "task": task.name}
            for task in kept
            for o in task.outputs()
        ],
        "classes": list(label_space.classes),
        "preprocessing": dict(preprocessing),
        "label_space": label_space.state(),
        **origin,
    }
    for task in kept:
        manifest |= task.manifest()
    return manifest
