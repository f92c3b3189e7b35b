"""Depth: the distance of every pixel in metres.

Labels are files of one value per pixel (16 bit PNG, or TIFF of integers or floats), named by `depth_file_name`;
`depth_scale` of them are a metre, 0 says that nothing is known. Resizing an image leaves its metres as they are.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cv2
import numpy as np
import torch
from detectron2.layers import ShapeSpec
from torch import Tensor
from torch.nn import functional as F

from mtl_rcnn.data.faults import Fault, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_map import find_fault, is_labelled, label_fault, positive_number, read_map
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, ImageTarget, Prediction, Record, Sample, WrittenLabel
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric, Row
from mtl_rcnn.modeling.dense import build_decoder, enlarge, in_image_frame
from mtl_rcnn.modeling.slots import DecodedView, ImageTask, LossParts, Output, full_precision
from mtl_rcnn.visualize.canvas import Canvas

FIELD = "depth_file_name"
SCALE = "depth_scale"
BERHU_SHARE = 0.2
CROPS = {
    "garg": (0.40810811, 0.99189189, 0.03594771, 0.96405229),
    "eigen": (0.3324324, 0.91351351, 0.0359477, 0.96405229),
    "nyu": (45.5 / 480, 471.5 / 480, 41.5 / 640, 601.5 / 640),
}
"""Shares of the height (top, bottom) and of the width (left, right) within which pixels are scored: on KITTI that of
Garg et al. and that of Eigen et al., and that of Eigen et al. on NYUD (rows 45 to 471, columns 41 to 601 of 480 x
640; halves, since edges are cut to whole pixels), as the evaluation code of BTS and its many descendants has them."""
_FINEST_SCALE = 1000
_LARGEST = np.iinfo(np.uint16).max
_DELTAS = (1, 2, 3)
_ERRORS = ("squared", "squared_log", "relative", "squared_relative")
SUMS = ("pixels", *_ERRORS, *(f"within_{k}" for k in _DELTAS))
"""What a results row holds beside the image's id."""


class DepthTarget(ImageTarget):
    """A map of metres per image.

    Args:
        name, label_space: see `Target`.
        min_depth, max_depth: metres; what lies outside neither trains nor is scored.
    """

    covers = True

    def __init__(self, name: str, label_space: LabelSpace, min_depth: float, max_depth: float) -> None:
        super().__init__(name, label_space)
        self.limits = _limits(name, min_depth, max_depth)

    def check(self, record: Record) -> Coverage:
        """Looks at the file's head alone. DataError: it is declared and missing, no image of one value per pixel, of
        another size than its image, or without a scale."""
        labelled = is_labelled(record, FIELD, self.declared(record))
        if labelled and (fault := self._head_fault(record)):
            refuse(fault)
        return Coverage(image=labelled)

    def faults(self, record: Record) -> Iterator[Fault]:
        """What `check` refuses; files that cannot be decoded, hold negative or infinite values, or no known one."""
        if not is_labelled(record, FIELD, self.declared(record)):
            return
        if fault := self._head_fault(record):
            yield fault
            return
        try:
            read_metres(record, self.name, *self.limits)
        except DataError as error:
            yield Fault("depth map", str(error), record[FIELD], record["image_id"])

    def load(self, record: Record, geometry: Geometry) -> Tensor | None:
        """(H, W) float32 metres, 0 where nothing is known. DataError: see `faults`."""
        if not is_labelled(record, FIELD, self.declared(record)):
            return None
        return torch.from_numpy(geometry.raster(read_metres(record, self.name, *self.limits)))

    def as_prediction(self, sample: Sample) -> Prediction:
        """depth (H, W) float32 metres, 0 where nothing is known."""
        if not sample["labelled"].get(self.name) or self.name not in sample["targets"]:
            return {"depth": torch.zeros(sample["image"].shape[-2:])}
        return {"depth": sample["targets"][self.name]}

    def as_label(self, record: Record, prediction: Prediction, threshold: float) -> WrittenLabel:
        """A 16 bit map of millimetres, or coarser where `max_depth` needs it. The network does not say how sure it is
        of a distance: `threshold` leaves nothing out."""
        scale = min(_FINEST_SCALE, int(_LARGEST / self.limits[1]))
        metres = np.clip(prediction["depth"].cpu().numpy(), *self.limits)
        values = np.clip(np.rint(metres * scale), 1, _LARGEST).astype(np.uint16)
        return WrittenLabel(image={SCALE: scale}, maps={FIELD: values})

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """Colours from red (near) to blue (far) over the image, black where nothing is known, and the range."""
        metres = prediction["depth"].cpu().numpy()
        known = metres > 0
        if not known.any():
            return
        near, far = float(metres[known].min()), float(metres[known].max())
        shade = 255 * (far - metres) / max(far - near, 1e-6)
        colors = cv2.applyColorMap(np.clip(shade, 0, 255).astype(np.uint8), cv2.COLORMAP_TURBO)[:, :, ::-1]
        canvas.raster(np.where(known[:, :, None], colors, 0).astype(np.uint8), alpha=0.7)
        canvas.caption(f"{near:.2f} m (red) to {far:.2f} m (blue)")

    def _head_fault(self, record: Record) -> Fault | None:
        return find_fault(record, FIELD, self.name) or _scale_fault(record)


class DepthEvaluator(Evaluator):
    """Errors in metres over the pixels whose true depth is known, within [min_depth, max_depth] and within the crop.
    Predictions are clipped to the same range first.

    Each error once pooled over the pixels of the set, so that a picture counts by its known pixels, and once as the
    mean of the images' own (`..._per_image`): publications do either.

    Args:
        name, label_space, records: see `Evaluator`.
        min_depth, max_depth: metres; `max_depth` is the cap of the literature (80 on KITTI, 10 on NYUD).
        crop: a name of `CROPS`; four shares [top, bottom, left, right]; None scores all of the image.
    """

    headline = "rmse"

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        records: Sequence[Record],
        min_depth: float,
        max_depth: float,
        crop: str | Sequence[float] | None,
    ) -> None:
        super().__init__(name, label_space, records)
        self.limits = _limits(name, min_depth, max_depth)
        self.crop = _crop(name, crop)

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """One row per labelled image: the number of pixels, the sums of their errors (`SUMS`) and how many of them are
        within a factor of 1.25, 1.25^2, 1.25^3 of the truth. Where the record knows of no labels, nearest and farthest
        metre and their median."""
        metres = prediction["depth"].double().numpy()
        if "tasks" not in record:
            near, middle, far = (float(value) for value in np.quantile(metres, (0, 0.5, 1)))
            return [{"image_id": record["image_id"], "nearest": near, "median": middle, "farthest": far}]
        if not self._is_labelled(record):
            return []
        truth = read_metres(record, self.name, *self.limits).astype(np.float64)
        counted = _inside(truth.shape, self.crop) & (truth > 0)
        sums = error_sums(np.clip(metres[counted], *self.limits), truth[counted])
        return [{"image_id": record["image_id"], **sums}]

    def metrics(self, rows: Sequence[Row]) -> dict[str, Metric]:
        """`rmse` (metres), `rmse_log` (natural logarithm), `abs_rel`, `sq_rel` (metres): less is better; `delta1`,
        `delta2`, `delta3`: percent of the pixels; and all of them `..._per_image`.

        Raises:
            DataError: a row that lacks a sum, or is of an image that has another or no label.
        """
        labelled = [record["image_id"] for record in self.records if self._is_labelled(record)]
        sums = self._sums(rows, set(labelled))
        missing, counted = len(labelled) - len(sums), sums[sums[:, 0] > 0]
        if len(counted) == 0:
            reason = "no image of the set is labelled for this task" if not labelled else "no predictions"
            return self._nothing(reason if missing or not labelled else "no pixel is within the crop and the range")
        reason = f"{missing} of {len(labelled)} labelled images have no prediction" if missing else None
        pooled, alone = _errors(counted.sum(axis=0)[None]), _errors(counted)
        every = [(name, values[0]) for name, values in pooled.items()]
        every += [(f"{name}_per_image", values.mean()) for name, values in alone.items()]
        return {name: Metric(float(value), name.startswith("delta"), reason) for name, value in every}

    def _nothing(self, reason: str) -> dict[str, Metric]:
        """The worst there is: of an error that is less than nothing, the largest distance."""
        names = [f"{name}{end}" for end in ("", "_per_image") for name in _errors(np.ones((1, len(SUMS))))]
        return {
            name: Metric(0.0 if name.startswith("delta") else self.limits[1], name.startswith("delta"), reason)
            for name in names
        }

    def _sums(self, rows: Sequence[Row], labelled: set[Any]) -> np.ndarray:
        """(R, S) float64 in the order of `SUMS`."""
        seen: set[Any] = set()
        for number, row in enumerate(rows):
            where = f"row {number} (image {row['image_id']!r})"
            faulty = [key for key in SUMS if not (positive_number(row.get(key)) or row.get(key) == 0)]
            if faulty:
                raise DataError(f"{where}: '{faulty[0]}' is {row.get(faulty[0])!r}; expected numbers {', '.join(SUMS)}")
            if row["image_id"] in seen or row["image_id"] not in labelled:
                text = "occurs twice" if row["image_id"] in seen else f"has no {FIELD}"
                raise DataError(f"{where}: the image {text}; expected one row per labelled image")
            seen.add(row["image_id"])
        return np.array([[float(row[key]) for key in SUMS] for row in rows]).reshape(-1, len(SUMS))

    def _is_labelled(self, record: Record) -> bool:
        declared = None if record["tasks"] is None else self.name in record["tasks"]
        return is_labelled(record, FIELD, declared)


class DepthTask(ImageTask):
    """A decoder of one channel. A pixel's metres are min_depth + softplus(raw), cut at max_depth in predictions.

    Nekrasov et al. (arXiv 1809.04766) take relu(raw), of which nothing is learned below 0; softplus is close to it,
    and its logarithm exists.

    Args:
        name, label_space, features: see `Task`.
        decoder: see `build_decoder`.
        min_depth, max_depth: metres.
        loss: "berhu" or "silog", see `berhu` and `silog`.
        normalize_by: of berhu, what its mean is over: "valid", the pixels whose depth is known; "all", all pixels of
            the image, so that images with few known pixels weigh less, as in the code of Nekrasov et al.
        silog_lambda: see `silog`.
    """

    target_class = DepthTarget
    evaluator_class = DepthEvaluator
    loss_parts = ("regression",)

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        *,
        decoder: Mapping[str, Any],
        min_depth: float,
        max_depth: float,
        loss: str,
        normalize_by: str,
        silog_lambda: float,
    ) -> None:
        super().__init__(name, label_space, features)
        for key, value, known in (
            ("loss", loss, ("berhu", "silog")),
            ("normalize_by", normalize_by, ("valid", "all")),
        ):
            if value not in known:
                raise ConfigError(f"tasks.{name}.{key}={value}: expected {' or '.join(known)}")
        if not 0 <= silog_lambda <= 1:
            raise ConfigError(f"tasks.{name}.silog_lambda={silog_lambda}: expected a number of 0 to 1")
        self.min_depth, self.max_depth = _limits(name, min_depth, max_depth)
        self.decoder = build_decoder(1, features, f"tasks.{name}.decoder", **decoder)
        self.stride = self.decoder.stride
        self.loss = loss
        self.normalize_by = normalize_by
        self.silog_lambda = float(silog_lambda)

    def outputs(self) -> list[Output]:
        """A map of the image's size."""
        meaning = f"metres of every pixel, {self.min_depth:g} to {self.max_depth:g}"
        return [Output("depth", "(H, W)", "float32", meaning)]

    def forward(self, features: dict[str, Tensor]) -> Tensor:
        """(B, 1, h, w) raw values of cells of `stride` pixels, of the padded network frame."""
        return self.decoder(features)

    def losses(self, raw: Tensor, targets: list[Tensor], image_sizes: Sequence[tuple[int, int]]) -> LossParts:
        """`regression`: `berhu` or `silog` of the network frame, padding excluded; metres are enlarged to it first
        (bilinear). Counts are pixels (berhu, see `normalize_by`) or images with a known pixel (silog): whatever batches
        and ranks the images are spread over, sums and counts are the same."""
        total, count = full_precision(raw[:0]).sum(), 0
        for values, target, (height, width) in zip(raw, targets, image_sizes, strict=True):
            metres = enlarge(self.metres(full_precision(values)), self.stride, height, width)[0]
            truth = target.to(metres)
            known = truth > 0
            number = int((target > 0).sum())
            # Without a known pixel the sum over nothing keeps the parameters in the graph.
            total = total + self._loss(metres[known], truth[known])
            whole = height * width if self.normalize_by == "all" else number
            count += min(number, 1) if self.loss == "silog" else whole
        return {"regression": (total, torch.tensor(float(count), device=raw.device))}

    def metres(self, raw: Tensor) -> Tensor:
        """Raw values as metres above `min_depth`, of any shape."""
        return self.min_depth + F.softplus(raw)

    @torch.jit.export
    def decode(self, raw: Tensor, padded_size: Tensor) -> dict[str, Tensor]:
        """cell_metres (B, 1, h, w), float32."""
        return {"cell_metres": self.metres(raw.float()).clamp(max=self.max_depth)}

    @torch.jit.export
    def to_image(self, decoded: dict[str, Tensor], network_size: Tensor, image_size: Tensor) -> dict[str, Tensor]:
        """depth (H, W) float32 metres."""
        return {"depth": in_image_frame(decoded["cell_metres"], self.stride, network_size, image_size)[0]}

    def merge_views(self, views: list[DecodedView], image_size: Tensor) -> dict[str, Tensor]:
        """depth (H, W) float32: the mean of the views' metres."""
        maps = [self.to_image(view.decoded, view.network_size, image_size)["depth"] for view in views]
        upright = [metres.flip(1) if view.mirrored else metres for metres, view in zip(maps, views, strict=True)]
        return {"depth": torch.stack(upright).mean(dim=0) if len(views) > 1 else upright[0]}

    def _loss(self, metres: Tensor, truth: Tensor) -> Tensor:
        return berhu(metres, truth) if self.loss == "berhu" else silog(metres, truth, self.silog_lambda)


def berhu(metres: Tensor, truth: Tensor) -> Tensor:
    """Sum of the reverse Huber loss (Laina et al., arXiv 1606.00373, section 3.2) over the known pixels of one image:
    with e = |metres - truth|, e where e <= c, else (e^2 + c^2) / (2 c).

    Departures: c is a fifth of the largest error of this image, not of the batch, so that an image's loss depends on no
    other image and on no rank; and c is a constant for the gradient (Nekrasov et al.'s code differentiates it).

    Args:
        metres, truth: (P,) each; P may be 0.
    """
    error = (metres - truth).abs()
    if error.numel() == 0:
        return error.sum()
    threshold = (BERHU_SHARE * error.detach().max()).clamp(min=1e-6)
    return torch.where(error <= threshold, error, (error**2 + threshold**2) / (2 * threshold)).sum()


def silog(metres: Tensor, truth: Tensor, share: float) -> Tensor:
    """Scale-invariant logarithmic loss (Eigen et al., arXiv 1406.2283, eq. 4) of one image: with d = ln metres - ln
    truth over its n known pixels, sum(d^2) / n - share * (sum(d) / n)^2; 0 without known pixels.

    Args:
        metres, truth: (P,) above 0 each; P may be 0.
        share: lambda; 0.5 in the paper, 1 ignores the scale altogether, 0 is the squared error of logarithms.
    """
    difference = metres.log() - truth.log()
    if difference.numel() == 0:
        return difference.sum()
    return (difference**2).mean() - share * difference.mean() ** 2


def read_metres(record: Record, task: str, min_depth: float, max_depth: float) -> np.ndarray:
    """(H, W) float32 metres of a labelled image, 0 where nothing is known or it is outside [min_depth, max_depth].

    Raises:
        DataError: see `label_map.read_map`; no scale, values that are negative or not finite, or no known pixel.
    """
    values = read_map(record, FIELD, task)
    if fault := _scale_fault(record):
        refuse(fault)
    faulty = ~np.isfinite(values) | (values < 0)
    if faulty.any():
        text = (
            f"{faulty.sum()} pixels are negative or not finite, such as {values[faulty].flat[0]:g}: expected "
            "distances, and 0 where nothing is known"
        )
        refuse(label_fault("negative depth", text, record, record[FIELD]))
    metres = (values / record[SCALE]).astype(np.float32)
    known = (metres >= min_depth) & (metres <= max_depth)
    if not known.any():
        text = (
            f"no pixel is within {min_depth:g} to {max_depth:g} m (values go from {values.min():g} to "
            f"{values.max():g}, {SCALE} is {record[SCALE]:g}): correct the scale or the limits, or leave the map out"
        )
        refuse(label_fault("no known depth", text, record, record[FIELD]))
    return np.where(known, metres, np.float32(0))


def error_sums(metres: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The sums of a results row (`SUMS`) over P pixels.

    Args:
        metres, truth: (P,) float64 above 0 each.
    """
    error, log = metres - truth, np.log(metres) - np.log(truth)
    factor = np.maximum(metres / truth, truth / metres)
    parts = (error**2, log**2, np.abs(error) / truth, error**2 / truth)
    sums = {name: float(values.sum()) for name, values in zip(_ERRORS, parts, strict=True)}
    within = {f"within_{k}": int((factor < 1.25**k).sum()) for k in _DELTAS}
    return {"pixels": len(truth), **sums, **within}


def _errors(sums: np.ndarray) -> dict[str, np.ndarray]:
    """(R,) each: the metrics of R rows of sums (R, S), each with a pixel."""
    pixels, squared, squared_log, relative, squared_relative, *within = sums.T
    found = {"rmse": np.sqrt(squared / pixels), "rmse_log": np.sqrt(squared_log / pixels)}
    found |= {"abs_rel": relative / pixels, "sq_rel": squared_relative / pixels}
    return found | {f"delta{k}": 100 * number / pixels for k, number in zip(_DELTAS, within, strict=True)}


def _inside(shape: tuple[int, int], crop: tuple[float, float, float, float]) -> np.ndarray:
    """(H, W) bool. Edges are cut to whole pixels."""
    (height, width), (top, bottom, left, right) = shape, crop
    inside = np.zeros(shape, dtype=bool)
    rows, columns = slice(int(top * height), int(bottom * height)), slice(int(left * width), int(right * width))
    inside[rows, columns] = True
    return inside


def _scale_fault(record: Record) -> Fault | None:
    if positive_number(record.get(SCALE)):
        return None
    text = (
        f"{SCALE} is {record.get(SCALE)!r}: expected the values per metre, such as 1000 for millimetres, in the "
        "image's entry or the dataset's image_fields"
    )
    return label_fault("no depth scale", text, record, str(record[FIELD]))


def _limits(name: str, min_depth: float, max_depth: float) -> tuple[float, float]:
    if not 0 < min_depth < max_depth:
        text = "expected 0 < min_depth < max_depth, in metres"
        raise ConfigError(f"tasks.{name}.min_depth={min_depth}, tasks.{name}.max_depth={max_depth}: {text}")
    return float(min_depth), float(max_depth)


def _crop(name: str, crop: str | Sequence[float] | None) -> tuple[float, float, float, float]:
    if crop is None:
        return (0.0, 1.0, 0.0, 1.0)
    shares = CROPS.get(crop, ()) if isinstance(crop, str) else tuple(crop)
    if len(shares) != 4 or not (0 <= shares[0] < shares[1] <= 1 and 0 <= shares[2] < shares[3] <= 1):
        known = ", ".join(CROPS)
        raise ConfigError(f"tasks.{name}.evaluator.crop={crop}: expected {known}, null, or [top, bottom, left, right]")
    return shares
