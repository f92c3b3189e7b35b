"""Keypoint: one heat map per keypoint and instance, a spatial softmax each (Mask R-CNN, arXiv 1703.06870, section 5).

Every class may own a schema (names, skeleton, left/right pairs). The output channels are the schemas one after the
other; a class owns one slice of them, and only that slice is trained and reported for its instances.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling.roi_heads.keypoint_head import KRCNNConvDeconvUpsampleHead
from detectron2.structures import Instances, Keypoints
from torch import Tensor, nn
from torch.nn import functional as F

from mtl_rcnn.data.coco_file import are_numbers
from mtl_rcnn.data.faults import Fault, Repair, refuse
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Coverage, InstanceTarget, Prediction, Record, Sample, place_of
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.evaluation.coco_evaluator import CocoEvaluator, View
from mtl_rcnn.evaluation.evaluator import Row, class_indices, instance_rows
from mtl_rcnn.modeling.heatmaps import highest_points
from mtl_rcnn.modeling.slots import LossParts, Output, RoiTask, full_precision
from mtl_rcnn.visualize.canvas import Canvas, color_of

logger = logging.getLogger(__name__)

PIXEL_CENTER = 0.5
"""COCO's keypoints name pixels; a pixel's centre lies half a pixel further in continuous coordinates (Detectron2's
convention)."""

COCO_PERSON_SIGMAS = (
    *(0.026, 0.025, 0.025, 0.035, 0.035, 0.079, 0.079, 0.072, 0.072),
    *(0.062, 0.062, 0.107, 0.107, 0.087, 0.087, 0.089, 0.089),
)
COCO_PERSON_NAMES = (
    *("nose", "left_eye", "right_eye", "left_ear", "right_ear", "left_shoulder", "right_shoulder", "left_elbow"),
    *("right_elbow", "left_wrist", "right_wrist", "left_hip", "right_hip", "left_knee", "right_knee", "left_ankle"),
    "right_ankle",
)
UNIFORM_SIGMA = 0.05


@dataclass(frozen=True)
class Schema:
    """The keypoints of one or several classes.

    Attributes:
        names: K names.
        edges: pairs of indices into `names`, for drawing.
        mirror: (K,) which keypoint each one becomes in a mirrored image.
        classes: class indices that own the schema.
        start: first output channel; the schema's channels are start .. start + K.
    """

    names: tuple[str, ...]
    edges: tuple[tuple[int, int], ...]
    mirror: tuple[int, ...]
    classes: tuple[int, ...]
    start: int

    @property
    def channels(self) -> slice:
        """The output channels of this schema."""
        return slice(self.start, self.start + len(self.names))


def read_schemas(
    label_space: LabelSpace, shared: Mapping[str, str], flip_pairs: Mapping[str, Sequence[Sequence[str]]]
) -> list[Schema]:
    """Schemas of all classes that declare `keypoints`, in class order.

    Args:
        label_space: its categories carry COCO's `keypoints` (names) and `skeleton` (pairs, counted from 1).
        shared: class name -> the class whose schema it uses.
        flip_pairs: class name -> pairs of keypoint names that a mirror swaps; default: names that differ in
            left/right only.

    Raises:
        ConfigError: an unknown class or keypoint name; no class declares keypoints; shared schemas of different names.
        DataError: keypoint names or a skeleton of another form than COCO's.
    """
    categories = {category["name"]: category for category in label_space.categories}
    for name in (*shared, *shared.values(), *flip_pairs):
        if name not in categories:
            raise ConfigError(f"keypoint schema of class '{name}': no such class; classes are {', '.join(categories)}")
    schemas: list[Schema] = []
    for name, category in categories.items():
        if not category.get("keypoints") or name in shared:
            continue
        users = [name, *(user for user, owner in shared.items() if owner == name)]
        start = schemas[-1].channels.stop if schemas else 0
        schemas.append(
            _schema(category, [label_space.classes.index(user) for user in users], start, flip_pairs.get(name))
        )
    _check_shared(categories, shared)
    if not schemas:
        raise ConfigError(
            "no class declares keypoints: the JSON's `categories[].keypoints` must name them; deselect the task "
            "otherwise"
        )
    return schemas


class KeypointTarget(InstanceTarget):
    """Keypoints of each instance, from COCO's `keypoints` (x, y, visibility). All invisible counts as not annotated.

    Args:
        shared_schemas, flip_pairs: see `read_schemas`.
    """

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        shared_schemas: Mapping[str, str],
        flip_pairs: Mapping[str, Sequence[Sequence[str]]],
    ) -> None:
        super().__init__(name, label_space)
        self.schemas = read_schemas(label_space, shared_schemas, flip_pairs)
        self.schema_of = {index: schema for schema in self.schemas for index in schema.classes}
        self.num_keypoints = self.schemas[-1].channels.stop

    def check(self, record: Record) -> Coverage:
        """Counts annotated instances. DataError: an array of the wrong length, a declared but missing array."""
        if self.declared(record) is False:
            return Coverage(image=False)
        for annotation in record["annotations"]:
            for fault in self._refused(record, annotation):
                refuse(fault)
        counts = [self._count(a) for a in record["annotations"] if not a["iscrowd"]]
        known = sum(count is not None for count in counts)
        labelled = self.declared(record) is True or known > 0 or not counts
        return Coverage(image=labelled, instances=sum(bool(count) for count in counts))

    def faults(self, record: Record) -> Iterator[Fault]:
        """Arrays of a wrong form; visibilities, places and counts that contradict the image or each other."""
        if self.declared(record) is False:
            return
        for annotation in record["annotations"]:
            refused = list(self._refused(record, annotation))
            yield from refused or self._doubts(record, annotation)

    def load(
        self, record: Record, annotations: Sequence[Mapping[str, Any]], geometry: Geometry
    ) -> dict[str, Any] | None:
        """`gt_keypoints`: (N, K, 3) x, y in network pixels and visibility 0/1/2 on the class's own channels, 0
        elsewhere;
        `gt_has_keypoint`: (N,) bool."""
        if self.declared(record) is False:
            return None
        points = np.zeros((len(annotations), self.num_keypoints, 3))
        for row, annotation in zip(points, annotations):
            schema = self.schema_of.get(annotation["category_id"])
            if schema is not None and annotation.get("keypoints"):
                row[schema.channels] = self._move(annotation["keypoints"], schema, geometry)
        has = torch.from_numpy((points[:, :, 2] > 0).any(axis=1))
        return {"gt_keypoints": Keypoints(points), f"gt_has_{self.name}": has}

    def as_prediction(self, sample: Sample) -> Prediction:
        """keypoints (N, K, 3): x, y, and 1 where annotated, 0 where not."""
        instances: Instances = sample["instances"]
        if not instances.has("gt_keypoints"):
            return {"keypoints": torch.zeros(len(instances), self.num_keypoints, 3)}
        points = instances.gt_keypoints.tensor.clone()
        points[:, :, 2] = (points[:, :, 2] > 0).float()
        return {"keypoints": points}

    def draw(self, canvas: Canvas, prediction: Prediction) -> None:
        """The skeleton of each instance whose class has one."""
        for index, (points, class_index) in enumerate(
            zip(prediction["keypoints"].cpu().numpy(), prediction["classes"].tolist())
        ):
            schema = self.schema_of.get(class_index)
            if schema is not None:
                canvas.skeleton(points[schema.channels], schema.edges, color_of(index), threshold=0.05)

    def _move(self, flat: Sequence[float], schema: Schema, geometry: Geometry) -> np.ndarray:
        points = np.asarray(flat, dtype=np.float64).reshape(-1, 3).copy()
        points[:, :2] = geometry.points(points[:, :2] + PIXEL_CENTER)
        inside = (points[:, :2] >= 0).all(axis=1) & (points[:, :2] <= [geometry.width, geometry.height]).all(axis=1)
        points[~inside, 2] = 0
        if geometry.mirrored:
            points = points[list(schema.mirror)]
        points[points[:, 2] == 0] = 0
        return points

    def _count(self, annotation: Mapping[str, Any]) -> int | None:
        """Number of annotated keypoints; None if the instance's class has no schema or nothing is said of its
        keypoints."""
        points = annotation.get("keypoints")
        if not points or annotation["category_id"] not in self.schema_of:
            return None
        return sum(visibility > 0 for visibility in points[2::3])

    def _refused(self, record: Record, annotation: Mapping[str, Any]) -> Iterator[Fault]:
        """What training cannot cope with."""
        schema = self.schema_of.get(annotation["category_id"])
        if schema is None:
            return
        points, number = annotation.get("keypoints"), 3 * len(schema.names)
        if not points:
            if self.declared(record) and not annotation["iscrowd"]:
                text = (
                    f"has no 'keypoints', but the dataset declares the task '{self.name}': add them (all zeros if "
                    f"they are not annotated), or take '{self.name}' out of the dataset's `tasks`"
                )
                yield self._fault("no keypoints", text, record, annotation, [0] * number)
        elif not isinstance(points, list) or not are_numbers(points):
            text = f"has keypoints {str(points)[:60]}: expected {number} finite numbers (x, y, visibility)"
            yield self._fault("malformed keypoints", text, record, annotation, [0] * number)
        elif len(points) != number:
            name = self.label_space.classes[annotation["category_id"]]
            text = (
                f"has {len(points)} keypoint numbers: class '{name}' declares {len(schema.names)} keypoints, so "
                f"{number} (x, y, visibility) are expected"
            )
            yield self._fault("keypoint array of another length", text, record, annotation, [0] * number)

    def _doubts(self, record: Record, annotation: Mapping[str, Any]) -> Iterator[Fault]:
        """What training copes with: it drops labelled points outside the image, and counts points itself."""
        schema = self.schema_of.get(annotation["category_id"])
        if schema is None or not annotation.get("keypoints"):
            return
        points = np.array(annotation["keypoints"], dtype=np.float64).reshape(-1, 3)
        strange = ~np.isin(points[:, 2], (0, 1, 2))
        centers = points[:, :2] + PIXEL_CENTER
        outside = ((centers < 0) | (centers > [record["width"], record["height"]])).any(axis=1)
        outside &= ~strange & (points[:, 2] > 0)
        cleaned = list(annotation["keypoints"])
        for index in np.flatnonzero(strange | outside):
            cleaned[3 * index : 3 * index + 3] = [0, 0, 0]
        size = f"{record['width']} x {record['height']} pixels"
        for index in np.flatnonzero(strange):
            text = f"gives '{schema.names[index]}' the visibility {points[index, 2]:g}: expected 0, 1 or 2"
            yield self._fault("keypoint visibility", text, record, annotation, cleaned, fatal=False)
        for index in np.flatnonzero(outside):
            x, y = points[index, :2]
            text = f"labels '{schema.names[index]}' at ({x:g}, {y:g}): expected a place in the image of {size}"
            yield self._fault("keypoint outside the image", text, record, annotation, cleaned, fatal=False)
        said, labelled = annotation.get("num_keypoints"), int((points[:, 2] > 0).sum())
        if said is not None and said != labelled:
            text = f"says num_keypoints {said}, but labels {labelled} (visibility above 0)"
            yield self._fault("num_keypoints", text, record, annotation, cleaned, fatal=False)

    def _fault(
        self,
        kind: str,
        text: str,
        record: Record,
        annotation: Mapping[str, Any],
        points: list[float],
        fatal: bool = True,
    ) -> Fault:
        """A fault that these keypoints would mend; several of one annotation all carry the same."""
        labelled = sum(visibility > 0 for visibility in points[2::3])
        name = "recount num_keypoints" if kind == "num_keypoints" else "mark the keypoints as not labelled"
        return Fault(
            kind,
            f"{place_of(record, annotation)} {text}",
            image_id=record["image_id"],
            annotation_id=annotation["id"],
            field="keypoints",
            repair=Repair(name, fields={"keypoints": points, "num_keypoints": labelled}),
            fatal=fatal,
        )


class KeypointEvaluator(CocoEvaluator):
    """COCO keypoint AP (object keypoint similarity), once per schema; with several schemas, the means over them.

    Args:
        shared_schemas, flip_pairs: see `read_schemas`.
        sigmas: class name -> per-keypoint standard deviations of the similarity, one number for all, or "coco"; a class
            that is not named gets COCO's when its keypoints are COCO's 17, else 0.05 for all, with a warning.
    """

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        records: Sequence[Record],
        shared_schemas: Mapping[str, str],
        flip_pairs: Mapping[str, Sequence[Sequence[str]]],
        sigmas: Mapping[str, Any],
    ) -> None:
        super().__init__(name, label_space, records)
        self.schemas = read_schemas(label_space, shared_schemas, flip_pairs)
        class_indices(label_space, list(sigmas), f"tasks.{name}.evaluator.sigmas")
        self.sigmas = [self._sigmas(schema, sigmas) for schema in self.schemas]

    def rows(self, record: Record, prediction: Prediction) -> list[Row]:
        """COCO keypoint rows of the classes that have a schema: (x, y, score) per keypoint, x and y naming pixels
        as COCO's do."""
        schema_of = {index: schema for schema in self.schemas for index in schema.classes}
        points = prediction["keypoints"].clone()
        points[:, :, :2] -= PIXEL_CENTER
        values = [
            row[schema_of[class_index].channels].flatten().tolist() if class_index in schema_of else None
            for row, class_index in zip(points, prediction["classes"].tolist())
        ]
        return instance_rows(record, prediction, "keypoints", values)

    def views(self) -> list[View]:
        """Each schema by itself: sigmas belong to a schema."""
        return [View("keypoints", schema.classes, sigmas) for schema, sigmas in zip(self.schemas, self.sigmas)]

    def _sigmas(self, schema: Schema, given: Mapping[str, Any]) -> tuple[float, ...]:
        name = self.label_space.classes[schema.classes[0]]
        sigmas = given.get(name)
        if sigmas == "coco" or (sigmas is None and schema.names == COCO_PERSON_NAMES):
            sigmas = COCO_PERSON_SIGMAS
        if sigmas is None:
            logger.warning("class '%s': no keypoint sigmas given, using %s for all", name, UNIFORM_SIGMA)
            sigmas = UNIFORM_SIGMA
        if isinstance(sigmas, int | float):
            sigmas = (float(sigmas),) * len(schema.names)
        if len(sigmas) != len(schema.names):
            raise ConfigError(
                f"tasks.{self.name}.evaluator.sigmas.{name} has {len(sigmas)} values: the class declares "
                f"{len(schema.names)} "
                "keypoints"
            )
        return tuple(sigmas)


class KeypointTask(RoiTask):
    """Keypoint R-CNN's branch: 3x3 convolutions, one transposed convolution, bilinear upsampling by 2.

    Args:
        shared_schemas, flip_pairs: see `read_schemas`.
        conv_dims: channels of the convolutions.
        normalize_by: "visible" divides the loss by the visible keypoints in the batch, "regions" by the number of
            keypoints that
            `regions_per_image` foreground regions per image would have, so that an image counts by how many it
            really has.
        regions_per_image: for "regions"; 128 = 512 * 0.25 in the papers.
    """

    target_class = KeypointTarget
    evaluator_class = KeypointEvaluator
    loss_parts = ("heatmap",)
    detectron2_names = {"roi_heads.keypoint_head.": "roi_heads.tasks.{name}.head."}
    torchvision_names = {  # a ReLU stands between two convolutions
        **{
            rf"roi_heads\.keypoint_head\.{2 * index}\.(\w+)": rf"roi_heads.tasks.{{name}}.head.conv_fcn{index + 1}.\1"
            for index in range(16)
        },
        r"roi_heads\.keypoint_predictor\.kps_score_lowres\.(\w+)": r"roi_heads.tasks.{name}.head.score_lowres.\1",
    }

    def __init__(
        self,
        name: str,
        label_space: LabelSpace,
        features: Mapping[str, ShapeSpec],
        *,
        conv_dims: Sequence[int],
        shared_schemas: Mapping[str, str],
        flip_pairs: Mapping[str, Sequence[Sequence[str]]],
        normalize_by: str,
        regions_per_image: int,
        **pooling: Any,
    ) -> None:
        super().__init__(name, label_space, features, **pooling)
        if normalize_by not in ("visible", "regions"):
            raise ConfigError(f"tasks.{name}.normalize_by={normalize_by}: expected visible or regions")
        self.schemas = read_schemas(label_space, shared_schemas, flip_pairs)
        self.classes = label_space.classes
        self.normalize_by, self.regions_per_image = normalize_by, regions_per_image
        self.num_keypoints = self.schemas[-1].channels.stop
        head = KRCNNConvDeconvUpsampleHead(
            self.pooled_shape, num_keypoints=self.num_keypoints, conv_dims=list(conv_dims)
        )
        # Only the layers: the head's own forward takes Instances, which TorchScript cannot.
        self.head = nn.Sequential(OrderedDict(head.named_children()))
        owned = torch.zeros(self.num_classes, self.num_keypoints)
        for schema in self.schemas:
            owned[list(schema.classes), schema.channels] = 1
        self.register_buffer("owned", owned, persistent=False)

    def outputs(self) -> list[Output]:
        """Keypoints of all schemas' channels."""
        meaning = (
            "x, y in pixels of the original image and a score per channel; a class's keypoints are its slice in "
            "`keypoints`, other channels are 0"
        )
        return [Output("keypoints", f"(N, {self.num_keypoints}, 3)", "float32", meaning)]

    def manifest(self) -> dict[str, Any]:
        """Per class: first and last channel (exclusive), keypoint names and skeleton."""
        return {
            "keypoints": {
                self.classes[index]: {
                    "channels": [schema.channels.start, schema.channels.stop],
                    "names": list(schema.names),
                    "skeleton": [list(edge) for edge in schema.edges],
                }
                for schema in self.schemas
                for index in schema.classes
            }
        }

    def select(self, regions: list[Instances]) -> list[Instances]:
        """Annotated foreground with at least one visible keypoint inside the region."""
        return [_with_visible_keypoint(image) for image in super().select(regions)]

    def forward(self, pooled: Tensor) -> Tensor:
        """(R, K, 4S, 4S) heat map logits of all schemas' channels."""
        return F.interpolate(self.head(pooled), scale_factor=2.0, mode="bilinear", align_corners=False)

    def losses(self, raw: Tensor, regions: list[Instances]) -> LossParts:
        """`heatmap`: cross-entropy over the 4S x 4S positions, summed over keypoints that are visible and inside
        their region."""
        used = [image for image in regions if len(image) > 0]
        side = raw.shape[-1]
        pairs = [image.gt_keypoints.to_heatmap(image.proposal_boxes.tensor, side) for image in used]
        none = raw.new_zeros(0, dtype=torch.int64)
        targets = torch.cat([target.flatten() for target, _ in pairs] or [none])
        visible = torch.nonzero(torch.cat([valid.flatten() for _, valid in pairs] or [none])).squeeze(1)
        logits = full_precision(raw.reshape(raw.shape[0] * raw.shape[1], side * side)[visible])
        loss = F.cross_entropy(logits, targets[visible], reduction="sum")
        count = len(visible)
        if self.normalize_by == "regions":
            count = len(regions) * self.num_keypoints * self.regions_per_image
        return {"heatmap": (loss, torch.tensor(float(count), device=raw.device))}

    def grids(self, raw: Tensor, classes: Tensor) -> dict[str, Tensor]:
        """keypoint_heatmaps (R, K, 4S, 4S): logits over the box, of all schemas' channels; decoding them loops over
        boxes."""
        return {"keypoint_heatmaps": raw}

    @torch.jit.export
    def decode(self, raw: Tensor, boxes: Tensor, classes: Tensor, image_index: Tensor) -> dict[str, Tensor]:
        """keypoints (R, K, 3): x, y in network pixels, score; 0 on channels the class does not own."""
        owned = self.owned[classes]
        # Decoding goes region by region and is slow: classes without keypoints are spared it.
        rows = torch.nonzero(owned.sum(dim=1)).squeeze(1)
        points = highest_points(raw[rows].float(), boxes[rows])
        # As many zeros as fit; `zeros` would write today's device into a trace.
        decoded = torch.zeros_like(raw[:, :, 0, :3], dtype=points.dtype)
        decoded[rows] = points
        return {"keypoints": decoded * owned[:, :, None]}

    def unflip(self, raw: Tensor) -> Tensor:
        """Heat maps mirrored back, and what was left and right swapped within each schema. Their average over views
        (the mean of the logits) is that of Detectron's test-time augmentation (`im_detect_keypoints_aug`)."""
        mirror = [schema.start + index for schema in self.schemas for index in schema.mirror]
        return raw.flip(3)[:, mirror]

    @torch.jit.export
    def to_image(
        self, decoded: dict[str, Tensor], boxes: Tensor, scale: Tensor, image_size: Tensor
    ) -> dict[str, Tensor]:
        """keypoints (N, K, 3) in the original frame."""
        points = decoded["keypoints"]
        return {"keypoints": torch.cat([points[:, :, :2] * scale, points[:, :, 2:]], dim=2)}


def _with_visible_keypoint(regions: Instances) -> Instances:
    if len(regions) == 0:
        return regions
    points, boxes = regions.gt_keypoints.tensor, regions.proposal_boxes.tensor[:, None]
    inside = (points[..., :2] >= boxes[..., :2]).all(dim=2) & (points[..., :2] <= boxes[..., 2:]).all(dim=2)
    return regions[torch.nonzero((inside & (points[..., 2] >= 1)).any(dim=1)).squeeze(1)]


def _schema(
    category: Mapping[str, Any], classes: Sequence[int], start: int, pairs: Sequence[Sequence[str]] | None
) -> Schema:
    names, edges = category["keypoints"], category.get("skeleton") or []
    if not isinstance(names, list) or not all(isinstance(name, str) and name for name in names):
        raise DataError(f"class '{category['name']}': its keypoints are {names!r}; expected a list of names")
    pairs_of_numbers = isinstance(edges, list) and all(
        isinstance(edge, list) and len(edge) == 2 and {*map(type, edge)} == {int} for edge in edges
    )
    if not pairs_of_numbers:
        raise DataError(
            f"class '{category['name']}': its skeleton is {edges!r}; expected pairs of keypoint numbers, counted from 1"
        )
    names, edges = tuple(names), tuple((a - 1, b - 1) for a, b in edges)
    if any(not 0 <= end < len(names) for edge in edges for end in edge):
        raise ConfigError(f"class '{category['name']}': its skeleton names a keypoint outside 1..{len(names)}")
    mirror = _mirror(names, pairs if pairs is not None else _left_right(names), category["name"])
    return Schema(names, edges, mirror, tuple(classes), start)


def _left_right(names: Sequence[str]) -> list[tuple[str, str]]:
    swapped = {name: name.replace("left", "right") for name in names if "left" in name}
    return [(left, right) for left, right in swapped.items() if right in names]


def _mirror(names: Sequence[str], pairs: Sequence[Sequence[str]], class_name: str) -> tuple[int, ...]:
    mirror = list(range(len(names)))
    for left, right in pairs:
        if left not in names or right not in names:
            raise ConfigError(
                f"flip pair ({left}, {right}) of class '{class_name}': its keypoints are {', '.join(names)}"
            )
        a, b = names.index(left), names.index(right)
        mirror[a], mirror[b] = b, a
    return tuple(mirror)


def _check_shared(categories: Mapping[str, Mapping[str, Any]], shared: Mapping[str, str]) -> None:
    for user, owner in shared.items():
        own = categories[user].get("keypoints")
        if not categories[owner].get("keypoints") or (own and list(own) != list(categories[owner]["keypoints"])):
            raise ConfigError(
                f"class '{user}' cannot share the keypoint schema of '{owner}': their keypoint names differ"
            )
