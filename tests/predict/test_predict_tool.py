"""The prediction tool: every format says the same, a video becomes a video, nothing computed is lost."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from networks import images, write_checkpoint, write_images
from tiny import available_tasks

from mtl_rcnn.config import compose
from mtl_rcnn.errors import ConfigError, DataError, UnreadableImageError
from mtl_rcnn.predict import Predictor, Result
from mtl_rcnn.predict.drawings import Drawings
from mtl_rcnn.predict.run import predict_images


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a network with all tasks."""
    return write_checkpoint(tmp_path_factory.mktemp("run") / "network.pth", available_tasks())


def predict(checkpoint: Path, source: Any, folder: Path, *overrides: str) -> Path:
    given = [f"network={checkpoint}", f"input={source}", f"output_dir={folder}", "device=cpu", *overrides]
    return predict_images(compose("predict", given))


def write_video(path: Path, codec: str, size: tuple[int, int], frames: int) -> Path:
    """Flat frames whose grey grows: compression leaves them recognisable."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 8.0, size[::-1])
    assert writer.isOpened()
    for number in range(frames):
        writer.write(np.full((*size, 3), 30 + 20 * number, dtype=np.uint8))
    writer.release()
    return path


def read_video(path: Path) -> tuple[list[np.ndarray], float]:
    capture = cv2.VideoCapture(str(path))
    frames = []
    while (decoded := capture.read())[0]:
        frames.append(decoded[1])
    return frames, capture.get(cv2.CAP_PROP_FPS)


def test_all_formats_say_the_same(checkpoint: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    folders = {
        form: predict(checkpoint, files[0].parent, tmp_path / form, f"format={form}", "draw=false")
        for form in ("coco", "jsonl", "csv")
    }
    coco = {
        task: json.loads((folders["coco"] / f"predictions/images_{task}.json").read_text())
        for task in available_tasks()
    }
    assert len(coco["detection"]) > 20
    lines = [json.loads(line) for line in (folders["jsonl"] / "predictions/images.jsonl").read_text().splitlines()]
    described = json.loads((folders["coco"] / "predictions/images.json").read_text())
    for line, image, file, pixels in zip(lines, described, files, images(), strict=True):
        assert {key: line[key] for key in image} == image
        height, width = pixels.shape[:2]
        assert image == {"id": file.name, "file_name": str(file), "frame": None, "width": width, "height": height}
    for task, rows in coco.items():
        assert [row for line in lines for row in line[task]] == rows
        with (folders["csv"] / f"predictions/images_{task}.csv").open(newline="") as table:
            assert len(list(csv.reader(table))) == (len(rows) + 1 if rows else 0)
    with (folders["csv"] / "predictions/images_detection.csv").open(newline="") as table:
        for cells, row in zip(csv.DictReader(table), coco["detection"], strict=True):
            assert [float(cells[f"bbox_{side}"]) for side in range(4)] == row["bbox"]
            assert (cells["image_id"], float(cells["score"])) == (row["image_id"], row["score"])
    assert not (folders["csv"] / "drawings").exists()
    assert json.loads((folders["coco"] / "classes.json").read_text()) == ["figure", "disc"]


def test_rows_are_the_predictors_boxes(checkpoint: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    out = predict(checkpoint, files[0].parent, tmp_path / "out", "only_tasks=[detection]", "batch_size=3", "limit=4")
    rows = json.loads((out / "predictions/images_detection.json").read_text())
    assert sorted(path.name for path in (out / "predictions").iterdir()) == ["images.json", "images_detection.json"]
    results = list(Predictor(checkpoint, tasks=["detection"], batch_size=3)(files[0].parent, limit=4))
    boxes = [(result.name, *box) for result in results for box in result.boxes.tolist()]
    assert [row["image_id"] for row in rows] == [name for name, *_ in boxes]
    for row, (_, x0, y0, x1, y1) in zip(rows, boxes, strict=True):
        assert row["bbox"] == pytest.approx([x0, y0, x1 - x0, y1 - y0])
    assert sorted(path.name for path in (out / "drawings").iterdir()) == [f"{index}.png" for index in range(4)]


@pytest.mark.parametrize(("name", "codec", "size"), [("a.mp4", "mp4v", (48, 64)), ("b.avi", "MJPG", (40, 60))])
def test_a_video_becomes_an_annotated_video(
    checkpoint: Path, tmp_path: Path, name: str, codec: str, size: tuple[int, int]
) -> None:
    video = write_video(tmp_path / name, codec, size, 6)
    frames, rate = read_video(video)
    assert (len(frames), rate) == (6, 8.0)
    predictor = Predictor(checkpoint, batch_size=4)
    results = list(predictor(video))
    assert [(result.name, result.frame, result.path) for result in results] == [
        (f"{name}#{number}", number, video) for number in range(6)
    ]
    for result, frame in zip(results, frames, strict=True):
        assert (result.image == frame[:, :, ::-1]).all()
    expected = [predictor.draw(result, scale=1) for result in results]
    out = predict(checkpoint, video, tmp_path / "out", "score_threshold=0")
    drawn, drawn_rate = read_video(out / "drawings" / name)
    assert (len(drawn), drawn_rate) == (6, 8.0)
    height, width = size
    assert {frame.shape for frame in drawn} == {drawing.shape for drawing in expected}
    assert all(frame.shape[0] == height and frame.shape[1] >= width for frame in drawn)
    for frame, drawing, was in zip(drawn, expected, frames, strict=True):
        assert np.abs(frame.astype(int) - drawing[:, :, ::-1]).mean() < 12  # nothing but the codec between the two
        assert np.abs(frame[:, :width].astype(int) - was).max() > 60
    described = json.loads((out / "predictions/images.json").read_text())
    assert [image["frame"] for image in described] == list(range(6))


def test_frames_of_odd_sides_are_not_cut(tmp_path: Path) -> None:
    video = write_video(tmp_path / "a.mp4", "mp4v", (48, 64), 2)
    odd = np.full((45, 61, 3), 200, dtype=np.uint8)
    with Drawings(tmp_path / "drawn") as drawings:
        for number in range(2):
            drawings.add(Result(f"a.mp4#{number}", video, number, odd, {}, ()), odd)
    frames, _ = read_video(tmp_path / "drawn" / "a.mp4")
    assert [frame.shape for frame in frames] == [(46, 62, 3)] * 2
    assert np.abs(frames[1].astype(int) - 200).max() < 10


def test_broken_files_are_left_out_and_counted(checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    files = write_images(tmp_path / "images")
    files[1].write_bytes(b"")
    (tmp_path / "images" / "x.mp4").write_bytes(b"no video")
    out = predict(checkpoint, tmp_path / "images" / "*", tmp_path / "out")
    said = capsys.readouterr().out
    assert "2 images could not be read and are left out: 1.png, x.mp4" in said
    assert "4 images: drawings and predictions" in said
    assert len(json.loads((out / "predictions/images.json").read_text())) == 4


@pytest.mark.parametrize("form", ["coco", "jsonl", "csv"])
def test_an_error_leaves_what_was_computed(checkpoint: Path, tmp_path: Path, form: str) -> None:
    files = write_images(tmp_path / "images")
    files[3].write_bytes(b"no image")
    quick = [f"format={form}", "batch_size=2", "only_tasks=[detection]"]
    with pytest.raises(UnreadableImageError, match=r"3\.png"):
        predict(checkpoint, files[0].parent, tmp_path / "out", "on_error=raise", *quick)
    whole = predict(checkpoint, files[0].parent, tmp_path / "whole", "limit=3", *quick)
    found = sorted((tmp_path / "out" / "predictions").iterdir())
    assert [path.read_text() for path in found] == [
        path.read_text() for path in sorted((whole / "predictions").iterdir())
    ]
    assert len(list((tmp_path / "out" / "drawings").iterdir())) == 3


def test_names_stay_inside_the_folder(checkpoint: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    files[0].rename(files[0].with_suffix(".bmp"))
    given = f"[{files[0].with_suffix('.bmp')},{files[1]},{files[1].parent}/../images/{files[2].name}]"
    out = predict(checkpoint, given, tmp_path / "out", "only_tasks=[detection]")
    drawn = sorted((out / "drawings").rglob("*.png"))
    assert [path.stem for path in drawn] == ["0", "1", "2"]


def test_images_of_one_stem_get_two_drawings(checkpoint: Path, tmp_path: Path) -> None:
    files = write_images(tmp_path / "images")
    files[1].rename(files[0].with_suffix(".bmp"))
    out = predict(checkpoint, files[0].parent, tmp_path / "out", "limit=2", "only_tasks=[detection]")
    assert sorted(path.name for path in (out / "drawings").iterdir()) == ["0.png", "0.png.png"]


def test_nothing_readable_is_an_error(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"none of 1 images could be read; the first: .*a\.png"):
        predict(checkpoint, tmp_path / "a.png", tmp_path / "out")


@pytest.mark.parametrize(
    ("setting", "error"),
    [
        ("format=xml", "format=xml: expected coco or jsonl or csv"),
        ("on_error=ignore", "on_error=ignore: expected skip or raise"),
        ("batch_size=0", "batch_size=0: expected a whole number of at least 1"),
        ("workers=1.5", "workers=1.5"),
        ("limit=0", "limit=0"),
        ("tta.scales=[0]", "tta.scales=.*expected null or a list of whole numbers"),
        ("tta.flip=2", "tta.flip=2: expected true or false"),
    ],
)
def test_settings_are_checked_before_anything_is_loaded(setting: str, error: str) -> None:
    with pytest.raises(ConfigError, match=error):
        compose("predict", ["network=a", "input=b", setting])
