"""Runs an exported network with torch and torchvision alone. This file lies beside `model.ts` and `manifest.json`.

    from runtime import ExportedNetwork
    network = ExportedNetwork("model.ts")
    prediction = network(network.read("image.jpg"))   # {"boxes": (N, 4), "scores": (N,), ...}, original image's pixels
    predictions = network.batch([first, second])      # one pass if the file was scripted, one per image if traced

Command line: python runtime.py model.ts image.jpg
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torchvision  # noqa: F401 (registers the operators that the network uses)
from torch import Tensor
from torchvision.io import ImageReadMode, decode_image
from torchvision.transforms.v2.functional import resize


class ExportedNetwork:
    """An exported network with its manifest.

    Args:
        path: `model.ts`, with `manifest.json` beside it, or the folder of both.
        device: where to run.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu") -> None:
        path = Path(path)
        path = path / "model.ts" if path.is_dir() else path
        self.manifest = json.loads(path.with_name("manifest.json").read_text(encoding="utf-8"))
        self.classes: list[str] = self.manifest["classes"]
        self.device = torch.device(device)
        self.module = torch.jit.load(str(path), map_location=self.device).eval()

    @staticmethod
    def read(path: str | Path) -> Tensor:
        """An image file as (3, H, W) uint8 RGB, turned upright."""
        return decode_image(str(path), mode=ImageReadMode.RGB, apply_exif_orientation=True)

    def __call__(self, image: Tensor) -> dict[str, Tensor]:
        """Predictions by name, as `outputs` of the manifest describes them, in the pixels of `image`.

        Args:
            image: (3, H, W) uint8 RGB.
        """
        return self.batch([image])[0]

    @torch.no_grad()
    def batch(self, images: list[Tensor]) -> list[dict[str, Tensor]]:
        """Predictions of several images, of any sizes. In one pass the smaller are padded to the size of the largest,
        which changes their predictions a little.

        Args:
            images: (3, H, W) uint8 RGB each.
        """
        inputs = [self.preprocess(image).to(self.device) for image in images]
        sizes = [torch.tensor(image.shape[-2:], device=self.device) for image in images]
        names = [entry["name"] for entry in self.manifest["outputs"]]
        if self.manifest.get("method", "trace") == "trace":
            return [dict(zip(names, self.module(*pair))) for pair in zip(inputs, sizes)]
        return [{name: found[name] for name in names} for found in self.module(inputs, sizes)] if images else []

    def preprocess(self, image: Tensor) -> Tensor:
        """(3, H, W) uint8 RGB -> what the network takes: resized, channels in its order."""
        rule = self.manifest["preprocessing"]
        height, width = rule.get("size") or network_size(
            image.shape[-2], image.shape[-1], rule["short_edge"], rule["max_size"]
        )
        if (height, width) != tuple(image.shape[-2:]):
            image = resize(image, [height, width], antialias=True)
        return image.flip(0) if rule["channel_order"] == "BGR" else image


def network_size(height: int, width: int, short_edge: int | None, max_size: int) -> tuple[int, int]:
    """The size an image is resized to: short side `short_edge`, unless the long side would exceed `max_size`."""
    if short_edge is None:
        return height, width
    scale = short_edge / min(height, width)
    new_height, new_width = (short_edge, scale * width) if height < width else (scale * height, short_edge)
    if max(new_height, new_width) > max_size:
        shrink = max_size / max(new_height, new_width)
        new_height, new_width = new_height * shrink, new_width * shrink
    return int(new_height + 0.5), int(new_width + 0.5)


def main() -> None:
    """Prints the predictions of one image as JSON, values per pixel in a few numbers (see `summary`)."""
    if len(sys.argv) != 3:
        sys.exit("usage: python runtime.py model.ts image.jpg")
    network = ExportedNetwork(sys.argv[1])
    prediction = network(network.read(sys.argv[2]))
    shapes = {entry["name"]: entry["shape"] for entry in network.manifest["outputs"]}
    print(json.dumps({name: summary(value, shapes[name]) for name, value in prediction.items()}))


def summary(value: Tensor, shape: str) -> Any:
    """An output as plain values; nothing grows with the number of pixels.

    Args:
        value: the output.
        shape: as the manifest says it. Where it ends in "H, W)", masks become their numbers of pixels, maps of classes
            the pixels of each value, and maps of numbers their least, mean and greatest.
    """
    if not shape.replace(" ", "").endswith("H,W)"):
        return _plain(value)
    if value.dtype == torch.bool:
        return _plain(value.sum(dim=(-2, -1)))
    if not value.is_floating_point():
        found, pixels = value.unique(return_counts=True)
        return {"pixels": dict(zip(found.tolist(), pixels.tolist()))}
    known = value[value.isfinite()]
    if known.numel() == 0:
        return {"least": None, "mean": None, "greatest": None}
    return {"least": _plain(known.min()), "mean": _plain(known.mean()), "greatest": _plain(known.max())}


def _plain(value: Tensor) -> Any:
    """Numbers as JSON knows them: what is not finite is null."""
    if value.is_floating_point() and not bool(value.isfinite().all()):
        return [_plain(row) for row in value] if value.dim() else None
    return value.tolist()


if __name__ == "__main__":
    main()
