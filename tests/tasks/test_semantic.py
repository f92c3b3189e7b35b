"""What is particular to semantic segmentation: ids, unknown pixels, the loss, the confusion matrix, results files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.layers import ShapeSpec
from detectron2.modeling.meta_arch.semantic_seg import SemSegFPNHead
from PIL import Image
from tiny import tiny_config
from torch import Tensor

from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Record
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.pretrained.names import rename
from mtl_rcnn.engine.pretrained.weight_file import WeightFile
from mtl_rcnn.errors import DataError
from mtl_rcnn.modeling.slots import DecodedView
from mtl_rcnn.tasks.semantic import SemanticEvaluator, SemanticTarget, SemanticTask, confusion_matrix, confusion_metrics

HEIGHT, WIDTH = 12, 18
NAMES = ("ground", "sky", "tree", "car")
IDS = {7: 0, 8: 1, 200: 2, 0: 3}
SPACE = LabelSpace((), {"sem_seg_classes": tuple({"name": name} for name in NAMES)})
TARGET = SemanticTarget("semantic", SPACE, 255)


def record(path: Path | None, image_id: int = 3, **fields: Any) -> dict[str, Any]:
    named = {} if path is None else {"sem_seg_file_name": str(path)}
    base = {"dataset": "toy", "image_id": image_id, "height": HEIGHT, "width": WIDTH, "annotations": [], "tasks": None}
    return {**base, "vocabularies": {"sem_seg_classes": IDS}, **named, **fields}


def written(folder: Path, values: np.ndarray, name: str = "map.png") -> Path:
    Image.fromarray(values).save(folder / name)
    return folder / name


def ids_of(indices: np.ndarray, dtype: type = np.uint8) -> np.ndarray:
    """The dataset's ids of class indices, 255 for negative ones."""
    table = np.array([*({index: own for own, index in IDS.items()}[i] for i in range(len(NAMES))), 255], dtype)
    return table[indices]


def some_classes(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(-1, len(NAMES), (HEIGHT, WIDTH))


# Reading


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16])
def test_ids_become_indices_and_the_ignore_label_becomes_unknown(dtype: type, tmp_path: Path) -> None:
    indices = some_classes()
    label = TARGET.load(record(written(tmp_path, ids_of(indices, dtype))), Geometry.identity(HEIGHT, WIDTH))
    assert label["classes"].numpy().tolist() == indices.tolist()
    assert label["labelled"].tolist() == [True] * 4


def test_labels_follow_the_image_and_pixels_beyond_it_are_unknown(tmp_path: Path) -> None:
    indices = some_classes()
    path = written(tmp_path, ids_of(indices))
    mirrored = Geometry(T.TransformList([T.HFlipTransform(WIDTH)]), HEIGHT, WIDTH)
    assert (TARGET.load(record(path), mirrored)["classes"].numpy() == indices[:, ::-1]).all()
    twice = Geometry(T.TransformList([T.ResizeTransform(HEIGHT, WIDTH, 24, 36)]), 24, 36)
    assert (TARGET.load(record(path), twice)["classes"].numpy() == np.kron(indices, np.ones((2, 2)))).all()
    turn = T.RotationTransform(HEIGHT, WIDTH, 30, expand=True)
    turned = Geometry(T.TransformList([turn]), turn.bound_h, turn.bound_w)
    label = TARGET.load(record(path), turned)["classes"]
    assert label[0, 0] == -1
    assert set(label.unique().tolist()) <= {-1, 0, 1, 2, 3}


def test_presence_decides_unless_the_dataset_declares(tmp_path: Path) -> None:
    path = written(tmp_path, ids_of(some_classes()))
    identity = Geometry.identity(HEIGHT, WIDTH)
    assert TARGET.check(record(path)).image
    assert not TARGET.check(record(None)).image
    assert TARGET.load(record(None), identity) is None
    assert not TARGET.check(record(path, tasks=("depth",))).image
    assert TARGET.load(record(path, tasks=("depth",)), identity) is None
    with pytest.raises(DataError, match=r"image 3 has no 'sem_seg_file_name', but .* declares the task 'semantic'"):
        TARGET.check(record(None, tasks=("semantic",)))


@pytest.mark.parametrize(
    ("values", "fields", "said"),
    [
        (
            np.full((HEIGHT, WIDTH), 9, np.uint8),
            {},
            r"216 pixels have the class id 9: expected ids of 'sem_seg_classes",
        ),
        (np.zeros((HEIGHT, WIDTH + 1), np.uint8), {}, r"map.png is 19 x 12 pixels .* expected its image's 18 x 12"),
        (np.zeros((HEIGHT, WIDTH, 3), np.uint8), {}, r"has 3 values per pixel \(R, G, B\): expected one"),
        (np.zeros((HEIGHT, WIDTH), np.uint8), {"vocabularies": {}}, "nothing says what its values mean"),
        (
            np.zeros((HEIGHT, WIDTH), np.uint8),
            {"vocabularies": {"sem_seg_classes": {0: 0, 255: 1}}},
            "id 255 is also `ignore_label`",
        ),
        *(
            (
                np.zeros((HEIGHT, WIDTH), np.uint8),
                {"vocabularies": {"sem_seg_classes": {0: 0, odd: 1}}},
                f"a class has the id {odd!r}, expected a whole number from 0 to 65535",
            )
            for odd in (-1, 70000, "road")
        ),
    ],
    ids=["unknown id", "size", "colours", "no vocabulary", "ambiguous", "negative", "large", "text"],
)
def test_a_map_that_does_not_fit_names_the_image_and_the_file(
    values: np.ndarray, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    faulty = record(written(tmp_path, values), **fields)
    with pytest.raises(DataError, match=rf"dataset 'toy', image 3: .*{said}"):
        TARGET.load(faulty, Geometry.identity(HEIGHT, WIDTH))
    (fault,) = TARGET.faults(faulty)
    assert fault.image_id == 3
    assert fault.file.endswith("map.png")


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"there is no label file .*none\.png"):
        TARGET.check(record(tmp_path / "none.png"))
    path = written(tmp_path, np.random.default_rng(0).integers(0, 4, (HEIGHT, WIDTH)).astype(np.uint8))
    path.write_bytes(path.read_bytes()[:-30])
    with pytest.raises(DataError, match=r"map\.png: the label file cannot be read"):
        TARGET.load(record(path), Geometry.identity(HEIGHT, WIDTH))
    path.write_text("<html>")
    with pytest.raises(DataError, match=r"map\.png: the label file cannot be read"):
        TARGET.check(record(path))


def test_negative_ids_of_a_signed_file_are_refused(tmp_path: Path) -> None:
    path = written(tmp_path, np.full((HEIGHT, WIDTH), -3, np.int32), "map.tif")
    with pytest.raises(DataError, match="values from -3 to -3 of int32: expected class ids"):
        TARGET.load(record(path), Geometry.identity(HEIGHT, WIDTH))


# Loss


def task(**knobs: Any) -> SemanticTask:
    torch.manual_seed(0)
    cfg = tiny_config(["semantic"], *(f"tasks.semantic.{key}={value}" for key, value in knobs.items()))
    return build_model(cfg, SPACE).image_tasks["semantic"]


def label(seed: int, height: int, width: int, labelled: tuple[bool, ...] = (True,) * 4) -> dict[str, Tensor]:
    choice = [-1, *(index for index, has in enumerate(labelled) if has)]
    classes = np.random.default_rng(seed).choice(choice, (height, width))
    return {"classes": torch.tensor(classes, dtype=torch.int16), "labelled": torch.tensor(labelled)}


def numpy_loss(logits: np.ndarray, target: dict[str, Tensor], height: int, width: int) -> tuple[float, int]:
    """Cross-entropy pixel by pixel, on logits between cells of 4 pixels."""
    classes, labelled = target["classes"].numpy(), target["labelled"].numpy()
    total, count = 0.0, 0
    rows, columns = -(-height // 4), -(-width // 4)
    for y in range(height):
        for x in range(width):
            if classes[y, x] < 0:
                continue
            v, u = np.clip((y + 0.5) / 4 - 0.5, 0, rows - 1), np.clip((x + 0.5) / 4 - 0.5, 0, columns - 1)
            top, left = int(v), int(u)
            bottom, right = min(top + 1, rows - 1), min(left + 1, columns - 1)
            upper = logits[:, top, left] * (1 - u + left) + logits[:, top, right] * (u - left)
            lower = logits[:, bottom, left] * (1 - u + left) + logits[:, bottom, right] * (u - left)
            pixel = upper * (1 - v + top) + lower * (v - top)
            total += np.log(np.exp(pixel[labelled]).sum()) - pixel[classes[y, x]]
            count += 1
    return total, count


SIZES = [(30, 41), (32, 48), (17, 20)]
PARTLY = (True, False, True, True)


@pytest.mark.parametrize("labelled", [(True,) * 4, PARTLY], ids=["all classes", "some classes"])
def test_the_loss_equals_a_numpy_reference(labelled: tuple[bool, ...]) -> None:
    raw = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [label(seed, *size, labelled) for seed, size in enumerate(SIZES)]
    total, count = task().losses(raw, targets, SIZES)["ce"]
    expected = [numpy_loss(*parts, *size) for parts, size in zip(zip(raw.numpy(), targets), SIZES)]
    assert float(count) == sum(number for _, number in expected)
    assert float(total) == pytest.approx(sum(value for value, _ in expected), rel=1e-9)


def test_two_halves_of_a_batch_have_the_sums_of_the_whole() -> None:
    raw = torch.randn(3, 4, 8, 12, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    targets = [label(0, *SIZES[0]), label(1, *SIZES[1], PARTLY), label(2, *SIZES[2])]
    whole = task().losses(raw, targets, SIZES)["ce"]
    parts = [task().losses(raw[part], targets[part], SIZES[part])["ce"] for part in (slice(0, 1), slice(1, 3))]
    assert float(whole[0]) == pytest.approx(float(parts[0][0] + parts[1][0]), rel=1e-12)
    assert whole[1] == parts[0][1] + parts[1][1]


def test_unknown_pixels_and_padding_train_nothing() -> None:
    raw = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    target = label(0, 30, 41)
    target["classes"][10:] = -1
    total, _ = task().losses(raw, [target], [(30, 41)])["ce"]
    total.backward()
    assert raw.grad[:, :, 4:].abs().sum() == 0  # rows of cells below the labelled pixels and their neighbours
    assert raw.grad[:, :, :, 11:].abs().sum() == 0  # columns of padding
    assert raw.grad[:, :, :2, :10].abs().sum() > 0


def test_a_class_that_a_dataset_lacks_gets_no_gradient_from_it() -> None:
    raw = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0)).requires_grad_()
    task().losses(raw, [label(0, 30, 41, PARTLY)], [(30, 41)])["ce"][0].backward()
    assert raw.grad[0].abs().sum(dim=(1, 2)).gt(0).tolist() == list(PARTLY)


def test_a_panoptic_fpn_of_detectron2_gives_its_weights() -> None:
    model = build_model(tiny_config(["semantic"]), SPACE)
    levels = {name: ShapeSpec(channels=16, stride=2 ** int(name[1])) for name in ("p2", "p3", "p4", "p5")}
    theirs = SemSegFPNHead(levels, num_classes=4, conv_dims=32, common_stride=4, norm="GN").state_dict()
    named = {f"sem_seg_head.{name}": value for name, value in theirs.items()}
    named["backbone.bottom_up.stem.conv1.weight"] = torch.zeros(8, 3, 7, 7)
    found = rename(WeightFile("panoptic.pkl", named), model)
    own = {name for name in model.state_dict() if name.startswith("image_tasks.")}
    assert {name for name in found.tensors if name.startswith("image_tasks.")} == own
    assert not found.unused


# Scores


def loop_reference(truths: list[np.ndarray], guesses: list[np.ndarray]) -> dict[str, float]:
    """Counted pixel by pixel, class by class."""
    iou, recall, hits, pixels = {}, {}, 0, 0
    for index, name in enumerate(NAMES):
        inter = union = true = 0
        for truth, guess in zip(truths, guesses):
            for t, g in zip(truth.ravel().tolist(), guess.ravel().tolist()):
                if t == -1:
                    continue
                inter += t == index and g == index
                union += t == index or g == index
                true += t == index
        hits, pixels = hits + inter, pixels + true
        if true:
            iou[name], recall[name] = inter / union, inter / true
    whole = {"mIoU": np.mean([*iou.values()]), "mean_accuracy": np.mean([*recall.values()])}
    whole["pixel_accuracy"] = hits / pixels
    return {name: 100 * value for name, value in {**whole, **{f"IoU/{n}": v for n, v in iou.items()}}.items()}


@pytest.fixture
def scene(tmp_path: Path) -> tuple[list[Record], list[np.ndarray], list[np.ndarray]]:
    """Three records with labels, their true and predicted classes; no car is true, some are predicted; one record
    without labels."""
    truths = [np.where(some_classes(seed) == 3, 0, some_classes(seed)) for seed in range(3)]
    rng = np.random.default_rng(9)
    guesses = [np.where(rng.random((HEIGHT, WIDTH)) < 0.6, truth, rng.integers(0, 4, truth.shape)) for truth in truths]
    guesses = [np.maximum(guess, 0) for guess in guesses]
    records = [record(written(tmp_path, ids_of(truth), f"{i}.png"), i) for i, truth in enumerate(truths)]
    return [*records, record(None, 99)], truths, guesses


def evaluator(records: list[Record]) -> SemanticEvaluator:
    return SemanticEvaluator("semantic", SPACE, records, 255)


def rows_of(records: list[Record], guesses: list[np.ndarray]) -> list[dict[str, Any]]:
    scorer = evaluator(records)
    return [row for r, g in zip(records, guesses) for row in scorer.rows(r, {"sem_seg": torch.tensor(g)})]


def test_scores_through_a_results_file_equal_a_reference(scene: Any) -> None:
    records, truths, guesses = scene
    rows = rows_of(records, [*guesses, guesses[0]])
    found = evaluator(records).metrics(rows)
    expected = loop_reference(truths, guesses)
    assert {name: found[name].value for name in expected} == pytest.approx(expected, rel=1e-12)
    assert "counts in no mean" in found["IoU/car"].reason
    assert {row["category_id"] for row in rows} <= set(IDS)
    assert all(set(row) == {"image_id", "category_id", "segmentation"} for row in rows)


def test_confusions_add_up_over_images_and_ranks(scene: Any) -> None:
    records, truths, guesses = scene
    parts = [confusion_matrix(t, g, 4) for t, g in zip(truths, guesses)]
    assert (sum(parts) == evaluator(records).confusion(rows_of(records, guesses))).all()
    whole = confusion_matrix(np.concatenate(truths), np.concatenate(guesses), 4)
    assert (whole == sum(parts)).all()
    assert confusion_metrics(whole, NAMES)["mIoU"].value == pytest.approx(loop_reference(truths, guesses)["mIoU"])


def test_pixels_without_a_prediction_are_wrong_for_their_class_alone(scene: Any) -> None:
    records, truths, _ = scene
    halves = [np.where(np.arange(WIDTH) < WIDTH // 2, truth, -1) for truth in truths]
    found = evaluator(records).metrics(rows_of(records, halves))
    expected = loop_reference(truths, halves)
    assert {name: found[name].value for name in expected} == pytest.approx(expected, rel=1e-12)
    assert 30 < found["pixel_accuracy"].value < 70


def test_rows_that_cannot_be_scored(scene: Any) -> None:
    records, _, guesses = scene
    scorer, rows = evaluator(records), rows_of(records, guesses)
    for change, said in (
        ({"category_id": 5}, r"row 0 \(image 0\): category_id 5; expected one of 7, 8, 200, 0"),
        ({"segmentation": {"size": [2, 2], "counts": "04"}}, r"row 0 .*'segmentation' is size \[2, 2\]"),
        ({"segmentation": "x"}, r"row 0 .*'segmentation' is 'x'; expected an RLE"),
    ):
        with pytest.raises(DataError, match=said):
            scorer.metrics([{**rows[0], **change}, *rows[1:]])
    with pytest.raises(DataError, match=r"row 1 .* overlaps another one"):
        scorer.metrics([rows[0], {**rows[0], "category_id": 8}])


def test_a_record_that_tells_of_no_vocabulary_gets_the_networks_indices() -> None:
    rows = evaluator([]).rows({"image_id": "x.jpg"}, {"sem_seg": torch.tensor([[2, 2, 0]])})
    assert [row["category_id"] for row in rows] == [0, 2]


# Inference


def test_views_are_averaged_in_probability_and_mirrored_back() -> None:
    head, size, image = task(), torch.tensor([30, 41]), torch.tensor([60, 82])
    raw = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    logits = head.decode(raw, size)["class_logits"][0]
    upright = DecodedView({"class_logits": logits}, size, False)
    alone = head.merge_views([upright], image)["sem_seg"]
    assert torch.equal(alone, head.to_image(upright.decoded, size, image)["sem_seg"])
    assert torch.equal(head.merge_views([upright, upright], image)["sem_seg"], alone)
    # A mirrored view of an image 40 pixels wide: whole cells, so that mirrored cells are the cells of the mirror image.
    even = torch.tensor([30, 40])
    turned = logits.clone()
    turned[:, :, :10] = logits[:, :, :10].flip(2)
    pair = [DecodedView({"class_logits": logits}, even, False), DecodedView({"class_logits": turned}, even, True)]
    both = head.merge_views(pair, image)["sem_seg"]
    assert torch.equal(both, head.merge_views(pair[:1], image)["sem_seg"])


def test_predictions_become_labels_where_they_are_sure(tmp_path: Path) -> None:
    head, size = task(), torch.tensor([HEIGHT, WIDTH])
    raw = torch.randn(1, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    decoded = {name: value[0] for name, value in head.decode(raw, size).items()}
    made = head.to_label(decoded, size, size)
    assert torch.equal(made["sem_seg"], head.to_image(decoded, size, size)["sem_seg"])
    written_label = TARGET.as_label(record(None), made, 0.5)
    path = written(tmp_path, written_label.maps["sem_seg_file_name"])
    read = TARGET.load(record(path), Geometry.identity(HEIGHT, WIDTH))["classes"]
    sure = made["sem_seg_confidence"] >= 0.5
    assert 0 < sure.sum() < sure.numel()
    assert torch.equal(read.long(), torch.where(sure, made["sem_seg"], -1))
    fewer = record(None, vocabularies={"sem_seg_classes": {7: 0}})
    assert set(np.unique(TARGET.as_label(fewer, made, 0.0).maps["sem_seg_file_name"])) == {7, 255}
    assert TARGET.as_label(record(None), made, 1.1) is None
    assert SemanticTarget("semantic", SPACE, None).as_label(fewer, made, 0.0) is None


def test_the_manifest_names_the_classes() -> None:
    assert task().manifest() == {"sem_seg_classes": list(NAMES)}
