"""The certificate of an exported network: on given inputs it predicts what the network itself predicts, or it is
not written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mtl_rcnn.data.target import Prediction
from mtl_rcnn.errors import ExportError

FLOAT_TOLERANCE = 1e-4
"""Largest absolute difference of any floating-point output."""

PIXEL_TOLERANCE = 1e-5
"""Largest share of an output's pixels (values of a bool tensor) that differ."""

Network = Callable[[list[Tensor], list[Tensor]], list[Prediction]]
"""(images (3, H, W), original sizes (2,)) of a batch -> predictions in the original frames."""


@dataclass(frozen=True)
class Case:
    """One input of the certificate, a batch.

    Attributes:
        name: what it shows.
        images: (3, H, W) uint8 each, network frame.
        sizes: (2,) int64 original height and width of each, other than (H, W).
    """

    name: str
    images: list[Tensor]
    sizes: list[Tensor]


@torch.no_grad()
def certify(eager: Network, exported: Network, cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Compares both networks on every case; the comparison as plain JSON values, one entry per case.

    Raises:
        ExportError: a case on which they differ: another number or order of detections, floats by more than 1e-4,
            masks by more than 1e-5 of their pixels.
    """
    report, faults = [], []
    for case in cases:
        pairs = list(zip(eager(case.images, case.sizes), exported(case.images, case.sizes), strict=True))
        differences: dict[str, float | None] = {}
        for expected, found in pairs:
            for name, value in expected.items():
                difference = _difference(value, found[name])
                differences[name] = _worse(differences.get(name, 0.0), difference)
                text = _fault(value, found[name], difference)
                faults += [] if text is None else [f"case '{case.name}', output '{name}': {text}"]
        report.append(
            {
                "case": case.name,
                "network_sizes": [list(image.shape[-2:]) for image in case.images],
                "original_sizes": [size.tolist() for size in case.sizes],
                "rows": [len(next(iter(expected.values()))) if expected else 0 for expected, _ in pairs],
                "differences": differences,
            }
        )
    if faults:
        raise ExportError(
            "the exported network differs from the network itself, nothing is written: " + "; ".join(faults)
        )
    return report


def _worse(one: float | None, other: float | None) -> float | None:
    return None if one is None or other is None else max(one, other)


def _difference(expected: Tensor, found: Tensor) -> float | None:
    """Largest absolute difference of floats, share of differing values of others; None for other shapes."""
    if expected.shape != found.shape or expected.dtype != found.dtype:
        return None
    if expected.numel() == 0:
        return 0.0
    if expected.is_floating_point():
        return float((expected.double() - found.double()).abs().max())
    return float((expected != found).double().mean())


def _fault(expected: Tensor, found: Tensor, difference: float | None) -> str | None:
    if difference is None:
        return f"{tuple(found.shape)} {found.dtype}, expected {tuple(expected.shape)} {expected.dtype}"
    if expected.is_floating_point():
        return None if difference <= FLOAT_TOLERANCE else f"differs by {difference:.3g}, allowed are {FLOAT_TOLERANCE}"
    allowed = PIXEL_TOLERANCE if expected.dtype == torch.bool else 0.0
    return None if difference <= allowed else f"{difference:.3g} of its values differ, allowed are {allowed}"


def choose_cases(network: Network, images: Sequence[Tensor], min_rows: int, batches: bool) -> list[Case]:
    """Inputs that show what may go wrong: three sizes, many detections, none, and batches of these.

    Args:
        network: the network itself, to count its detections.
        images: (3, H, W) uint8 network-frame images, real ones.
        min_rows: one case has more detections than this; 0 needs none.
        batches: whether several images make a case, too.

    Raises:
        ExportError: no input has so many detections, or none has none.
    """
    cases = [
        _case(f"size {index + 1}", _resized(images[index % len(images)], scale), stretch)
        for index, (scale, stretch) in enumerate(((1.0, 1.7), (0.8, 0.6), (1.3, 2.3)))
    ]
    if _rows(network, cases[0]) is not None:
        crowded = (_case("many detections", mosaic, 1.4) for mosaic in _mosaics(images))
        empty = (_case("no detections", torch.full_like(images[0], value), 1.4) for value in (114, 0, 255, 60, 180))
        if min_rows > 0:
            cases.append(_first(network, crowded, lambda rows: rows > min_rows, f"more than {min_rows} detections"))
        cases.append(_first(network, empty, lambda rows: rows == 0, "no detections"))
    if batches:
        first, last = cases[:3], cases[-3:]
        cases += [_together("batch of three sizes", first), _together("batch of three with none", last)]
    return cases


def one_by_one(names: Sequence[str], network: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Network:
    """A network of one image that returns a tuple, as a network of batches of one image."""

    def of_batch(images: list[Tensor], sizes: list[Tensor]) -> list[Prediction]:
        return [dict(zip(names, network(*pair), strict=True)) for pair in zip(images, sizes, strict=True)]

    return of_batch


def _rows(network: Network, case: Case) -> int | None:
    """Number of detections; None for a network without boxes."""
    with torch.no_grad():
        (prediction,) = network(case.images, case.sizes)
    return len(prediction["boxes"]) if "boxes" in prediction else None


def _first(network: Network, cases: Any, fits: Callable[[int], bool], wanted: str) -> Case:
    seen = []
    for case in cases:
        seen.append(_rows(network, case))
        if fits(seen[-1]):
            return case
    raise ExportError(
        f"certificate: no input with {wanted} was found (tried inputs have {seen}); train longer, give more images "
        "(certificate.images), or lower certificate.min_detections knowingly"
    )


def _case(name: str, image: Tensor, stretch: float) -> Case:
    size = [round(side * stretch) for side in image.shape[-2:]]
    return Case(name, [image], [torch.tensor(size)])


def _together(name: str, cases: Sequence[Case]) -> Case:
    return Case(name, [case.images[0] for case in cases], [case.sizes[0] for case in cases])


def _mosaics(images: Sequence[Tensor]) -> Any:
    """Real images side by side: 1 x 1, 2 x 2, 3 x 3 ... until something is crowded enough."""
    yield from images
    for side in (2, 3, 4):
        height, width = images[0].shape[-2:]
        tiles = [_fit(images[index % len(images)], height, width) for index in range(side * side)]
        yield torch.cat([torch.cat(tiles[row * side : (row + 1) * side], dim=2) for row in range(side)], dim=1)


def _resized(image: Tensor, scale: float) -> Tensor:
    return _fit(image, round(image.shape[-2] * scale), round(image.shape[-1] * scale))


def _fit(image: Tensor, height: int, width: int) -> Tensor:
    resized = torch.nn.functional.interpolate(
        image[None].float(), size=(height, width), mode="bilinear", antialias=True
    )
    return resized[0].round().clamp(0, 255).to(torch.uint8)
