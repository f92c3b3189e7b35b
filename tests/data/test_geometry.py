"""One geometry for everything: image, points, boxes and label maps go the same way, under every augmentation."""

from __future__ import annotations

import numpy as np
import pytest
from detectron2.data import transforms as T

from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.mapper import seeded
from mtl_rcnn.data.transforms import AffineTransform, RandomAffine, affine_matrix, build_augmentations
from mtl_rcnn.errors import ConfigError

HEIGHT, WIDTH = 60, 90

AUGMENTATIONS = {
    "resize": T.ResizeShortestEdge(90, 300),
    "mirror": T.RandomFlip(1.0),
    "upside down": T.RandomFlip(1.0, horizontal=False, vertical=True),
    "crop": T.RandomCrop("relative", (0.9, 0.9)),
    "rotation": T.RandomRotation([20, 20]),
    "affine": RandomAffine(rotate=(-25, 25), translate=(0.1, 0.1), scale=(0.8, 1.2), shear=(-10, 10)),
    "colour": T.RandomContrast(0.9, 1.1),
}


def _apply(augmentations: list, image: np.ndarray) -> tuple[np.ndarray, Geometry]:
    augmented = T.AugInput(image)
    with seeded(3):
        transforms = T.AugmentationList(augmentations)(augmented)
    return augmented.image, Geometry(transforms, *augmented.image.shape[:2])


def _spot(x: float, y: float, radius: float = 6) -> np.ndarray:
    """(H, W) uint8: a white disc around a point."""
    rows, columns = np.indices((HEIGHT, WIDTH)) + 0.5
    return np.where((columns - x) ** 2 + (rows - y) ** 2 <= radius**2, 255, 0).astype(np.uint8)


def _centre(weights: np.ndarray) -> np.ndarray:
    rows, columns = np.indices(weights.shape) + 0.5
    return np.array([(columns * weights).sum(), (rows * weights).sum()]) / weights.sum()


@pytest.mark.parametrize(
    "combination", [[name] for name in AUGMENTATIONS] + [["mirror", "affine", "rotation", "resize"]]
)
def test_image_points_and_raster_go_the_same_way(combination: list[str]):
    spot = _spot(50, 32)
    image, geometry = _apply([AUGMENTATIONS[name] for name in combination], np.repeat(spot[..., None], 3, axis=2))
    (point,) = geometry.points(np.array([[50.0, 32.0]]))
    # Outside the old image an augmentation may show grey: only the spot is brighter.
    bright = np.clip(image[..., 1].astype(float) - 150, 0, None)
    assert _centre(bright) == pytest.approx(point, abs=0.75)
    assert _centre(geometry.raster(spot > 0)) == pytest.approx(point, abs=0.75)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_box_encloses_what_it_enclosed(name: str):
    _, geometry = _apply([AUGMENTATIONS[name]], np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    (box,) = geometry.boxes(np.array([[40.0, 22.0, 60.0, 42.0]]))
    rows, columns = np.nonzero(geometry.raster(_spot(50, 32, 10)))
    assert box[0] - 0.5 <= columns.min()
    assert box[1] - 0.5 <= rows.min()
    assert columns.max() + 1 <= box[2] + 0.5
    assert rows.max() + 1 <= box[3] + 0.5


def test_box_is_clipped_and_may_become_empty():
    geometry = Geometry(T.TransformList([T.CropTransform(30, 0, 60, 60)]), 60, 60)
    boxes = geometry.boxes(np.array([[0.0, 10, 20, 20], [20, 10, 200, 20]]))
    assert boxes.tolist() == [[0, 10, 0, 20], [0, 10, 60, 20]]


def test_no_points_and_no_boxes():
    geometry = Geometry(T.TransformList([T.HFlipTransform(WIDTH), AffineTransform(np.eye(2, 3), 60, 90)]), 60, 90)
    assert geometry.points(np.zeros((0, 2))).shape == (0, 2)
    assert geometry.boxes(np.zeros((0, 4))).shape == (0, 4)


def test_arguments_are_left_as_they_are():
    geometry = Geometry(T.TransformList([T.HFlipTransform(WIDTH), T.ResizeTransform(60, 90, 30, 45)]), 30, 45)
    points, boxes, values = np.array([[10.0, 20.0]]), np.array([[1.0, 2.0, 3.0, 4.0]]), np.ones((60, 90))
    geometry.points(points), geometry.boxes(boxes), geometry.raster(values)
    assert (points.tolist(), boxes.tolist(), values.min()) == ([[10, 20]], [[1, 2, 3, 4]], 1)


@pytest.mark.parametrize(
    ("names", "mirrored"),
    [
        ([], False),
        (["mirror"], True),
        (["upside down"], True),
        (["mirror", "upside down"], False),
        (["mirror", "rotation", "resize"], True),
        (["affine", "crop"], False),
    ],
)
def test_mirrored_asks_the_determinant(names: list[str], mirrored: bool):
    _, geometry = _apply(
        [AUGMENTATIONS[name] for name in names] or [T.NoOpTransform()], np.zeros((60, 90, 3), np.uint8)
    )
    assert geometry.mirrored is mirrored


@pytest.mark.parametrize("dtype", [bool, np.uint8, np.int16, np.int32, np.int64, np.float32, np.float64])
def test_raster_keeps_every_dtype_and_invents_no_value(dtype: type):
    values = np.random.default_rng(0).choice([0, 1, 100], size=(HEIGHT, WIDTH)).astype(dtype)
    _, geometry = _apply(list(AUGMENTATIONS.values()), np.zeros((HEIGHT, WIDTH, 3), np.uint8))
    moved = geometry.raster(values)
    assert moved.dtype == values.dtype
    assert moved.shape == (geometry.height, geometry.width)
    assert set(np.unique(moved)) == set(np.unique(values))


def test_raster_fills_what_shows_nothing():
    geometry = Geometry(T.TransformList([T.RotationTransform(60, 90, 45)]), *_rotated_size(45))
    moved = geometry.raster(np.full((60, 90), 7, np.int32), fill=-1)
    assert set(np.unique(moved)) == {-1, 7}
    assert (moved == 7).sum() == pytest.approx(60 * 90, rel=0.05)
    assert moved[0, 0] == -1


def _rotated_size(angle: float) -> tuple[int, int]:
    rotation = T.RotationTransform(60, 90, angle)
    return int(rotation.bound_h), int(rotation.bound_w)


def test_identity():
    geometry = Geometry.identity(4, 6)
    values = np.arange(24).reshape(4, 6)
    assert (geometry.raster(values) == values).all()
    assert geometry.points([[1, 2]]).tolist() == [[1, 2]]


def test_affine_inverse_brings_points_back():
    matrix = affine_matrix((45, 30), rotate=33, scale=1.3, shear=12, shift=(4, -7))
    transform = AffineTransform(matrix, HEIGHT, WIDTH)
    points = np.random.default_rng(0).uniform(0, 60, (20, 2))
    assert np.allclose(transform.inverse().apply_coords(transform.apply_coords(points)), points)


def test_affine_identity_leaves_image_and_labels():
    transform = AffineTransform(affine_matrix((45, 30), 0, 1, 0, (0, 0)), HEIGHT, WIDTH)
    image = np.random.default_rng(0).integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
    assert (transform.apply_image(image) == image).all()
    assert (transform.apply_segmentation(image[..., 0]) == image[..., 0]).all()


def test_affine_turns_and_leans_as_documented():
    def move(point: tuple[float, float], **changes) -> np.ndarray:
        arguments = {"rotate": 0, "scale": 1, "shear": 0, "shift": (0, 0), **changes}
        return AffineTransform(affine_matrix((0, 0), **arguments), 10, 10).apply_coords(np.array([point]))[0]

    assert move((1, 0), rotate=90) == pytest.approx([0, -1])  # to the right becomes up: counter-clockwise
    assert move((0, -1), shear=45) == pytest.approx([1, -1])  # the upper end leans to the right
    assert move((1, 2), scale=2) == pytest.approx([2, 4])
    assert move((1, 2), shift=(3, 4)) == pytest.approx([4, 6])


def test_affine_fill_colour_and_other_dtypes():
    transform = AffineTransform(affine_matrix((45, 30), 0, 1, 0, (30, 0)), HEIGHT, WIDTH, fill=(10, 20, 30))
    image = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    assert transform.apply_image(image)[5, 5].tolist() == [10, 20, 30]
    assert transform.apply_image(image[..., 0])[5, 5] == 20
    moved = transform.apply_image(image.astype(np.float32))
    assert moved.dtype == np.float32
    assert moved[5, 60].tolist() == [200, 200, 200]


def test_affine_probability():
    augmentation = RandomAffine(rotate=(10, 20), prob=0.5)
    image = np.zeros((8, 8, 3), np.uint8)
    with seeded(0):
        applied = [isinstance(augmentation.get_transform(image), AffineTransform) for _ in range(200)]
    assert 70 < sum(applied) < 130


def test_augmentations_are_built_in_order_and_null_leaves_one_out():
    node = {
        "resize": {
            "_target_": "detectron2.data.transforms.ResizeShortestEdge",
            "short_edge_length": 64,
            "max_size": 99,
        },
        "flip": None,
        "maybe": {
            "_target_": "detectron2.data.transforms.RandomApply",
            "tfm_or_aug": {"_target_": "mtl_rcnn.data.transforms.RandomAffine", "rotate": [-5, 5]},
            "prob": 0.5,
        },
    }
    resize, maybe = build_augmentations(node)
    assert isinstance(resize, T.ResizeShortestEdge)
    assert isinstance(maybe, T.RandomApply)
    assert isinstance(maybe.aug, RandomAffine)
    assert build_augmentations(None) == []


@pytest.mark.parametrize(
    ("entry", "expected"),
    [
        (
            {"_target_": "os.system", "command": "true"},
            r"data\.test\.x\._target_=os\.system: augmentations are classes of",
        ),
        ({"_target_": "detectron2.data.transforms.np.save"}, "augmentations are classes of"),
        (
            {"_target_": "detectron2.data.transforms.RandomFlop"},
            r"no such augmentation \(did you mean 'RandomFlip'\?\)",
        ),
        ({"_target_": "mtl_rcnn.data.transforms.build_augmentations"}, "no such augmentation"),
        ({"_target_": "detectron2.data.transforms.RandomFlip", "probb": 1}, r"data\.test\.x: .*probb"),
        ({"_target_": "mtl_rcnn.data.transforms.RandomAffine", "scale": [0, 1]}, r"data\.test\.x: .*factors above 0"),
        ({"_target_": "mtl_rcnn.data.transforms.RandomAffine", "rotate": 5}, "rotate=5: expected two numbers"),
        ({"prob": 1}, r"data\.test\.x: no _target_"),
        ("flip", r"data\.test\.x: no _target_"),
    ],
)
def test_bad_augmentations_name_their_key(entry: object, expected: str):
    with pytest.raises(ConfigError, match=expected):
        build_augmentations({"x": entry}, "data.test")


@pytest.mark.parametrize("shape", [(40, 60, 3), (40, 60)])
def test_nearest_fill_repeats_the_border(shape: tuple[int, ...]):
    """Against bilinear sampling with clipped indices, in NumPy."""
    image = np.random.default_rng(0).integers(0, 256, shape).astype(np.float32)
    matrix = affine_matrix((30, 20), rotate=25, scale=0.7, shear=10, shift=(9, -8))
    moved = AffineTransform(matrix, 40, 60, fill="nearest").apply_image(image)
    inverse = np.linalg.inv(np.vstack([matrix, [0, 0, 1]]))[:2]
    rows, columns = np.indices((40, 60)) + 0.5
    x, y = (inverse[i, 0] * columns + inverse[i, 1] * rows + inverse[i, 2] - 0.5 for i in (0, 1))
    assert min(x.min(), 40 - y.max()) < -5, "the case shows nothing"
    left, top = np.floor(x).astype(int), np.floor(y).astype(int)
    expected = 0.0
    for down, right in ((0, 0), (0, 1), (1, 0), (1, 1)):
        weight = np.abs(1 - down - (y - top)) * np.abs(1 - right - (x - left))
        corner = image[np.clip(top + down, 0, 39), np.clip(left + right, 0, 59)]
        expected = expected + (weight[..., None] if image.ndim == 3 else weight) * corner
    np.testing.assert_allclose(moved, expected, atol=0.02)
    whole = AffineTransform(matrix, 40, 60, fill="nearest").apply_image(image.astype(np.uint8))
    assert np.abs(whole - expected).max() <= 1.01


def test_nearest_fill_changes_nothing_inside_and_no_label():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)
    matrix = affine_matrix((30, 20), rotate=25, scale=0.7, shear=0, shift=(9, -8))
    plain, nearest = (AffineTransform(matrix, 40, 60, fill) for fill in (0, "nearest"))
    inside = plain.apply_image(np.full((40, 60), 255, np.uint8)) == 255
    inside &= plain.apply_segmentation(np.pad(np.ones((36, 56), np.uint8), 2)) == 1
    assert inside.sum() > 500
    difference = plain.apply_image(image)[inside].astype(int) - nearest.apply_image(image)[inside]
    assert np.abs(difference).max() <= 1  # rounding of Pillow's fixed-point coordinates
    labels = np.ones((40, 60), np.int32)
    assert (plain.apply_segmentation(labels) == nearest.apply_segmentation(labels)).all()
    assert nearest.inverse().fill == "nearest"


def test_an_unknown_fill_is_told():
    node = {"affine": {"_target_": "mtl_rcnn.data.transforms.RandomAffine", "fill": "reflect"}}
    with pytest.raises(ConfigError, match=r"data\.train_augment\.affine: .*fill=reflect: expected a grey value"):
        build_augmentations(node)
