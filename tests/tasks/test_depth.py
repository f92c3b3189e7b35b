"""What is particular to depth: metres, unknown pixels, both losses, errors pooled and per image, the range and the
crop."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from PIL import Image
from test_train import toy_config
from tiny import LABEL_SPACE, tiny_config
from torch import Tensor
from toy import Toy

from mtl_rcnn.config import compose
from mtl_rcnn.data.geometry import Geometry
from mtl_rcnn.data.target import Record
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.evaluate import evaluate_checkpoint
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError, DataError
from mtl_rcnn.export.export import export_checkpoint
from mtl_rcnn.modeling.dense import enlarge
from mtl_rcnn.modeling.slots import DecodedView
from mtl_rcnn.predict.run import predict_images
from mtl_rcnn.tasks.depth import DepthEvaluator, DepthTarget, DepthTask, berhu, silog

HEIGHT, WIDTH = 12, 18
TARGET = DepthTarget("depth", LABEL_SPACE, 0.5, 10.0)


def record(path: Path | None, image_id: int = 3, **fields: Any) -> dict[str, Any]:
    named = {} if path is None else {"depth_file_name": str(path), "depth_scale": 1000}
    base = {"dataset": "toy", "image_id": image_id, "height": HEIGHT, "width": WIDTH, "annotations": [], "tasks": None}
    return {**base, "vocabularies": {}, **named, **fields}


def written(folder: Path, values: np.ndarray, name: str = "map.png") -> Path:
    Image.fromarray(values).save(folder / name)
    return folder / name


def some_values(seed: int = 0) -> np.ndarray:
    """Millimetres: a third unknown, some too near, some too far."""
    rng = np.random.default_rng(seed)
    return np.where(rng.random((HEIGHT, WIDTH)) < 0.3, 0, rng.integers(200, 12_000, (HEIGHT, WIDTH))).astype(np.uint16)


def in_range(values: np.ndarray) -> np.ndarray:
    metres = values / 1000
    return np.where((metres >= 0.5) & (metres <= 10), metres, 0)


# Reading


def test_values_become_metres_and_what_is_out_of_range_unknown(tmp_path: Path) -> None:
    values = some_values()
    label = TARGET.load(record(written(tmp_path, values)), Geometry.identity(HEIGHT, WIDTH))
    assert label.dtype == torch.float32
    np.testing.assert_allclose(label.numpy(), in_range(values), rtol=1e-6)
    assert {500, 0} != set(values.ravel().tolist())


@pytest.mark.parametrize("name", ["map.tif", "map.png"])
def test_other_kinds_of_files_and_scales(name: str, tmp_path: Path) -> None:
    metres = in_range(some_values()).astype(np.float32)
    values = metres if name == "map.tif" else (metres * 25).round().astype(np.uint8)
    scale = 1 if name == "map.tif" else 25
    label = TARGET.load(record(written(tmp_path, values, name), depth_scale=scale), Geometry.identity(HEIGHT, WIDTH))
    np.testing.assert_allclose(label.numpy(), metres, atol=0.021)


def test_resizing_moves_pixels_and_keeps_metres(tmp_path: Path) -> None:
    values = some_values()
    path = written(tmp_path, values)
    larger = Geometry(T.TransformList([T.ResizeTransform(HEIGHT, WIDTH, 36, 54)]), 36, 54)
    label = TARGET.load(record(path), larger).numpy()
    np.testing.assert_allclose(label, np.kron(in_range(values), np.ones((3, 3))), rtol=1e-6)
    odd = Geometry(T.TransformList([T.HFlipTransform(WIDTH), T.ResizeTransform(HEIGHT, WIDTH, 7, 11)]), 7, 11)
    assert set(TARGET.load(record(path), odd).unique().tolist()) <= set(np.float32(in_range(values)).ravel().tolist())


def test_presence_decides_unless_the_dataset_declares(tmp_path: Path) -> None:
    path, identity = written(tmp_path, some_values()), Geometry.identity(HEIGHT, WIDTH)
    assert TARGET.check(record(path)).image
    assert not TARGET.check(record(None)).image
    assert TARGET.load(record(None), identity) is None
    assert TARGET.load(record(path, tasks=()), identity) is None
    with pytest.raises(DataError, match=r"image 3 has no 'depth_file_name', but .* declares the task 'depth'"):
        TARGET.check(record(None, tasks=("depth",)))


@pytest.mark.parametrize(
    ("values", "fields", "said"),
    [
        (np.full((HEIGHT, WIDTH), -2, np.int32), {}, "216 pixels are negative or not finite, such as -2"),
        (np.full((HEIGHT, WIDTH), np.nan, np.float32), {}, "216 pixels are negative or not finite, such as nan"),
        (np.zeros((HEIGHT, WIDTH), np.int32), {}, r"no pixel is within 0\.5 to 10 m \(values go from 0 to 0"),
        (np.full((HEIGHT, WIDTH), 90, np.int32), {}, r"no pixel is within .* depth_scale is 1000\): correct the scale"),
        (np.zeros((WIDTH, HEIGHT), np.int32), {}, "is 12 x 18 pixels .* expected its image's 18 x 12"),
        (np.ones((HEIGHT, WIDTH), np.int32), {"depth_scale": None}, "depth_scale is None: expected the values per"),
        (np.ones((HEIGHT, WIDTH), np.int32), {"depth_scale": -5}, "depth_scale is -5"),
    ],
    ids=["negative", "nan", "unknown", "scale", "size", "no scale", "negative scale"],
)
def test_a_map_that_does_not_fit_names_the_image_and_the_file(
    values: np.ndarray, fields: dict[str, Any], said: str, tmp_path: Path
) -> None:
    faulty = record(written(tmp_path, values, "map.tif"), **fields)
    with pytest.raises(DataError, match=rf"dataset 'toy', image 3: .*{said}"):
        TARGET.load(faulty, Geometry.identity(HEIGHT, WIDTH))
    (fault,) = TARGET.faults(faulty)
    assert fault.image_id == 3
    assert fault.file.endswith("map.tif")


# Losses


def task(**knobs: Any) -> DepthTask:
    given = [f"tasks.depth.{key}={value}" for key, value in knobs.items()]
    return build_model(tiny_config(["depth"], *given), LABEL_SPACE).image_tasks["depth"]


SIZES = [(30, 41), (32, 48), (17, 20)]


def batch() -> tuple[Tensor, list[Tensor]]:
    raw = torch.randn(3, 1, 8, 12, generator=torch.Generator().manual_seed(0)) * 3
    rng = np.random.default_rng(0)
    labels = [np.where(rng.random(size) < 0.4, 0, rng.uniform(0.5, 10, size)) for size in SIZES]
    labels[2][:] = 0  # a crop that shows nothing known
    return raw, [torch.tensor(label, dtype=torch.float32) for label in labels]


def predicted(raw: Tensor) -> list[np.ndarray]:
    metres = 0.001 + np.log1p(np.exp(raw.double().numpy()))
    return [enlarge(torch.tensor(m), 4, *size)[0].numpy() for m, size in zip(metres, SIZES)]


def numpy_berhu(metres: np.ndarray, truth: np.ndarray) -> float:
    known = truth > 0
    if not known.any():
        return 0.0
    error = np.abs(metres[known] - truth[known])
    c = 0.2 * error.max()
    return sum(e if e <= c else (e * e + c * c) / (2 * c) for e in error.tolist())


@pytest.mark.parametrize("normalize_by", ["valid", "all"])
def test_berhu_equals_a_numpy_reference(normalize_by: str) -> None:
    raw, labels = batch()
    total, count = task(normalize_by=normalize_by).losses(raw, labels, SIZES)["regression"]
    expected = sum(numpy_berhu(m, t.numpy()) for m, t in zip(predicted(raw), labels))
    assert float(total) == pytest.approx(expected, rel=1e-4)
    known = sum(int((t > 0).sum()) for t in labels)
    assert float(count) == (known if normalize_by == "valid" else sum(h * w for h, w in SIZES))


def test_silog_equals_a_numpy_reference() -> None:
    raw, labels = batch()
    total, count = task(loss="silog", silog_lambda=0.85).losses(raw, labels, SIZES)["regression"]
    expected = 0.0
    for metres, label in zip(predicted(raw)[:2], labels):
        known = label.numpy() > 0
        d = np.log(metres[known]) - np.log(label.numpy()[known].astype(np.float64))
        expected += (d**2).sum() / len(d) - 0.85 / len(d) ** 2 * d.sum() ** 2
    assert float(total) == pytest.approx(expected, rel=1e-4)
    assert float(count) == 2  # the third image knows nothing


def test_losses_by_hand() -> None:
    truth = torch.tensor([2.0, 2.0, 2.0])
    metres = torch.tensor([2.5, 3.0, 7.0], requires_grad=True)  # errors 0.5, 1, 5: c = 1
    found = berhu(metres, truth)
    assert found.item() == pytest.approx(0.5 + 1 + (25 + 1) / 2)
    found.backward()
    assert metres.grad.tolist() == pytest.approx([1, 1, 5])
    assert berhu(truth, truth).item() == 0
    assert silog(truth * 3, truth, 1.0).item() == pytest.approx(0, abs=1e-6)
    assert silog(truth * np.e, truth, 0.5).item() == pytest.approx(0.5)


@pytest.mark.parametrize("loss", ["berhu", "silog"])
def test_two_halves_of_a_batch_have_the_sums_of_the_whole(loss: str) -> None:
    raw, labels = batch()
    head = task(loss=loss)
    whole = head.losses(raw, labels, SIZES)["regression"]
    parts = [head.losses(raw[part], labels[part], SIZES[part])["regression"] for part in (slice(0, 1), slice(1, 3))]
    assert float(whole[0]) == pytest.approx(float(parts[0][0] + parts[1][0]), rel=1e-6)
    assert whole[1] == parts[0][1] + parts[1][1]


@pytest.mark.parametrize("loss", ["berhu", "silog"])
def test_unknown_pixels_and_padding_train_nothing(loss: str) -> None:
    raw, labels = batch()
    raw.requires_grad_()
    labels[0][10:] = 0
    task(loss=loss).losses(raw, labels, SIZES)["regression"][0].backward()
    assert torch.isfinite(raw.grad).all()
    assert raw.grad[0, 0, 4:].abs().sum() == 0
    assert raw.grad[0, 0, :, 11:].abs().sum() == 0
    assert raw.grad[2].abs().sum() == 0
    assert raw.grad[0, 0, :2, :10].abs().sum() > 0


def test_extreme_outputs_have_finite_losses() -> None:
    for loss in ("berhu", "silog"):
        raw = torch.tensor([-200.0, 200.0]).reshape(2, 1, 1, 1).expand(2, 1, 8, 12).clone().requires_grad_()
        total, _ = task(loss=loss).losses(raw, batch()[1][:2], SIZES[:2])["regression"]
        total.backward()
        assert torch.isfinite(total)
        assert torch.isfinite(raw.grad).all()


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"loss": "l1"}, r"tasks\.depth\.loss=l1: expected berhu or silog"),
        ({"normalize_by": "image"}, r"tasks\.depth\.normalize_by=image: expected valid or all"),
        ({"silog_lambda": 2}, r"tasks\.depth\.silog_lambda=2: expected a number of 0 to 1"),
        ({"max_depth": 0.0001}, r"tasks\.depth\.max_depth=0.0001: expected 0 < min_depth < max_depth"),
    ],
)
def test_settings_that_do_not_fit(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        task(**knobs)


# Scores


def evaluator(records: list[Record], crop: Any = None) -> DepthEvaluator:
    return DepthEvaluator("depth", LABEL_SPACE, records, 0.5, 10.0, crop)


def reference(pairs: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Of (predicted, true) metres, pixel by pixel as the formulas are written."""

    def errors(p: np.ndarray, g: np.ndarray) -> dict[str, float]:
        ratio = np.max([p / g, g / p], axis=0)
        return {
            "rmse": np.sqrt(np.mean((p - g) ** 2)),
            "rmse_log": np.sqrt(np.mean((np.log(p) - np.log(g)) ** 2)),
            "abs_rel": np.mean(np.abs(p - g) / g),
            "sq_rel": np.mean((p - g) ** 2 / g),
            **{f"delta{k}": 100 * np.mean(ratio < 1.25**k) for k in (1, 2, 3)},
        }

    alone = [errors(p, g) for p, g in pairs]
    pooled = errors(np.concatenate([p for p, _ in pairs]), np.concatenate([g for _, g in pairs]))
    return pooled | {f"{name}_per_image": np.mean([e[name] for e in alone]) for name in pooled}


@pytest.fixture
def scene(tmp_path: Path) -> tuple[list[Record], list[np.ndarray], list[np.ndarray]]:
    """Three labelled records and one without a label, true values in millimetres, predicted metres."""
    values = [some_values(seed) for seed in range(3)]
    values[1][:9] = 0  # images differ in how much of them is known
    records = [record(written(tmp_path, value, f"{i}.png"), i) for i, value in enumerate(values)]
    rng = np.random.default_rng(5)
    guesses = [np.maximum(value / 1000, 1) * np.exp(rng.normal(0, 0.3, value.shape)) for value in values]
    return [*records, record(None, 99)], values, [guess.astype(np.float32) for guess in guesses]


def rows_of(scorer: DepthEvaluator, guesses: list[np.ndarray]) -> list[dict[str, Any]]:
    return [row for r, g in zip(scorer.records, guesses) for row in scorer.rows(r, {"depth": torch.tensor(g)})]


@pytest.mark.parametrize("crop", [None, "eigen", [0.25, 0.75, 0.0, 0.5]])
def test_scores_through_a_results_file_equal_a_reference(crop: Any, scene: Any) -> None:
    records, values, guesses = scene
    scorer = evaluator(records, crop)
    rows = json.loads(json.dumps(rows_of(scorer, [*guesses, guesses[0]])))
    edges = {None: (0, 12, 0, 18), "eigen": (3, 10, 0, 17)}.get(crop if crop is None else str(crop), (3, 9, 0, 9))
    inside = np.zeros((HEIGHT, WIDTH), bool)
    inside[edges[0] : edges[1], edges[2] : edges[3]] = True
    pairs = []
    for value, guess in zip(values, guesses):
        truth = in_range(value)
        known = (truth > 0) & inside
        if known.any():
            pairs.append((np.clip(guess[known].astype(np.float64), 0.5, 10), truth[known]))
    found = scorer.metrics(rows)
    expected = reference(pairs)
    assert {name: metric.value for name, metric in found.items()} == pytest.approx(expected, rel=1e-6)
    assert [row["image_id"] for row in rows] == [0, 1, 2]
    assert all(metric.higher_is_better == name.startswith("delta") for name, metric in found.items())
    assert found["rmse"].value != pytest.approx(found["rmse_per_image"].value, rel=1e-3)


def test_the_crop_of_nyud_has_its_published_pixels() -> None:
    from mtl_rcnn.tasks.depth import CROPS, _inside

    rows, columns = np.nonzero(_inside((480, 640), CROPS["nyu"]))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (45, 471, 41, 601)
    rows, columns = np.nonzero(_inside((375, 1242), CROPS["garg"]))
    assert (rows.min(), rows.max() + 1, columns.min(), columns.max() + 1) == (153, 371, 44, 1197)


def test_images_without_a_prediction_are_said(scene: Any) -> None:
    records, _, guesses = scene
    scorer = evaluator(records)
    some = scorer.metrics(rows_of(scorer, guesses)[:2])
    assert some["rmse"].reason == "1 of 3 labelled images have no prediction"
    nothing = scorer.metrics([])
    assert nothing["rmse"].value == 10.0
    assert nothing["delta1"].value == 0.0
    assert set(nothing) == set(some)
    assert "labelled" in evaluator(records[3:]).metrics([])["rmse"].reason


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"pixels": None}, r"row 0 \(image 0\): 'pixels' is None; expected numbers pixels, squared"),
        ({"squared": -1}, "'squared' is -1"),
        ({"image_id": 99}, r"row 0 \(image 99\): the image has no depth_file_name"),
        ({"image_id": 1}, r"row 1 \(image 1\): the image occurs twice"),
    ],
)
def test_rows_that_cannot_be_scored(change: dict[str, Any], said: str, scene: Any) -> None:
    scorer = evaluator(scene[0])
    rows = rows_of(scorer, scene[2])
    with pytest.raises(DataError, match=said):
        scorer.metrics([{**rows[0], **change}, *rows[1:]])


@pytest.mark.parametrize("crop", ["kitti", [0, 1], [0.5, 0.2, 0, 1], [0, 2, 0, 1]])
def test_crops_that_are_none(crop: Any) -> None:
    with pytest.raises(ConfigError, match=r"tasks\.depth\.evaluator\.crop=.*: expected garg, eigen, nyu"):
        evaluator([], crop)


def test_a_picture_without_labels_has_a_summary() -> None:
    (row,) = evaluator([]).rows({"image_id": "x.jpg"}, {"depth": torch.tensor([[1.0, 2.0, 4.0]])})
    assert row == {"image_id": "x.jpg", "nearest": 1.0, "median": 2.0, "farthest": 4.0}


# Inference


def test_predictions_are_metres_whatever_the_size_of_the_image() -> None:
    head = task(max_depth=5)
    raw = torch.full((1, 1, 8, 12), 3.0)
    raw[0, 0, :, 6:] = 40
    size = torch.tensor([32, 48])
    decoded = {name: value[0] for name, value in head.decode(raw, size).items()}
    for image in (torch.tensor([32, 48]), torch.tensor([320, 480]), torch.tensor([11, 16])):
        metres = head.to_image(decoded, size, image)["depth"]
        assert tuple(metres.shape) == tuple(image.tolist())
        assert metres[0, 0].item() == pytest.approx(3.0496, abs=1e-3)
        assert metres[0, -1].item() == 5
    views = [
        DecodedView(decoded, size, False),
        DecodedView({"cell_metres": decoded["cell_metres"].flip(2)}, size, True),
    ]
    torch.testing.assert_close(head.merge_views(views, size), head.to_image(decoded, size, size))


@pytest.mark.parametrize(("max_depth", "scale"), [(10.0, 1000), (80.0, 819)])
def test_predictions_become_labels(max_depth: float, scale: int, tmp_path: Path) -> None:
    target = DepthTarget("depth", LABEL_SPACE, 0.001, max_depth)
    metres = torch.rand(HEIGHT, WIDTH, generator=torch.Generator().manual_seed(0)) * max_depth
    label = target.as_label(record(None), {"depth": metres}, 0.5)
    assert label.image == {"depth_scale": scale}
    path = written(tmp_path, label.maps["depth_file_name"])
    read = target.load(record(path, **label.image), Geometry.identity(HEIGHT, WIDTH))
    torch.testing.assert_close(read, metres, rtol=0, atol=0.51 / scale + 0.001)


def test_a_network_without_boxes_trains_is_scored_predicts_and_is_exported_both_ways(toy: Toy, tmp_path: Path) -> None:
    cfg = toy_config(toy, tmp_path / "run", "report.enabled=true", "report.images=1", tasks=("depth",))
    outcome = train(cfg)
    assert outcome.metrics["toy/depth/rmse"].value < 80
    assert (outcome.folder / "report.html").is_file()
    scores = json.loads((outcome.folder / "metrics.json").read_text())
    given = [f"run={outcome.folder}", "device=cpu", "workers=0"]
    again = evaluate_checkpoint(compose("evaluate", given))
    file = outcome.folder / "predictions" / "toy_depth.json"
    of_file = evaluate_checkpoint(compose("evaluate", [*given, f"+results.depth={file}", f"output_dir={tmp_path}"]))
    assert {name: metric.value for name, metric in again.items()} == scores
    assert {name: metric.value for name, metric in of_file.items()} == scores
    seen = evaluate_checkpoint(compose("evaluate", [*given, "tta.flip=true", f"output_dir={tmp_path}"]))
    assert seen["toy/depth/rmse"].value != scores["toy/depth/rmse"]
    words = [f"network={outcome.folder}", f"input={toy.images}", "device=cpu", f"output_dir={tmp_path / 'seen'}"]
    folder = predict_images(compose("predict", words))
    assert len(json.loads((folder / "predictions" / "images_depth.json").read_text())) == 6
    assert len([*(folder / "drawings").iterdir()]) == 6
    for method in ("trace", "script"):
        knobs = [f"run={outcome.folder}", f"export.method={method}", "certificate.min_detections=0"]
        manifest = export_checkpoint(compose("export", knobs))
        assert [output["name"] for output in manifest["outputs"]] == ["depth"]
        assert all(d == 0 for case in manifest["certificate"] for d in case["differences"].values())
        assert manifest["fixed_devices"] == []
