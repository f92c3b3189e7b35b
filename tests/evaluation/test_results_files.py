"""Results files: written whole or not at all, and read again with one clear error for what is wrong."""

from __future__ import annotations

import json

import pytest
from fakes import LABELS, FakeEvaluator, records

from mtl_rcnn.errors import DataError, MtlRcnnError
from mtl_rcnn.evaluation.coco import coco_metrics
from mtl_rcnn.evaluation.evaluator import Evaluator, Metric
from mtl_rcnn.evaluation.results import evaluate_rows, read_metrics, write_json, write_metrics, write_predictions


class Boxes(Evaluator):
    def rows(self, record, prediction):
        raise NotImplementedError

    def metrics(self, rows):
        return coco_metrics(self.records, self.label_space, rows, "bbox")


def box_evaluator():
    annotation = {"id": 1, "category_id": 0, "bbox": [2, 2, 6, 6]}
    return Boxes(
        "boxes", LABELS, [{**records(1)[0], "annotations": [annotation], "classes": (0,), "category_ids": (9,)}]
    )


def test_a_written_file_scores_as_its_rows(tmp_path):
    rows = [{"image_id": 100, "category_id": 9, "bbox": [2, 2, 6, 6], "score": 0.5}]
    path = write_predictions(tmp_path, "toy", "boxes", rows)

    assert path == tmp_path / "predictions" / "toy_boxes.json"
    assert evaluate_rows(box_evaluator(), path) == coco_metrics(box_evaluator().records, LABELS, rows, "bbox")
    assert evaluate_rows(box_evaluator(), path)["AP"].value == pytest.approx(100)


@pytest.mark.parametrize(
    ("content", "text"),
    [
        (None, "cannot be read: No such file"),
        ("[{", "not valid JSON"),
        (
            '{"images": [], "annotations": []}',
            r"expected a JSON list of results rows, got an object with the keys images",
        ),
        ('[{"image_id": 100}, 3]', "row 1: expected an object with 'image_id', got 3"),
        (
            '[{"image_id": 100}, {"image_id": 7}]',
            r"row 1: image_id 7 is not in the dataset; it has 1 images such as 100",
        ),
    ],
)
def test_a_bad_file_is_one_clear_error(tmp_path, content, text):
    path = tmp_path / "results.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=rf"results\.json: .*{text}"):
        evaluate_rows(FakeEvaluator("fake", LABELS, records(1)), path)


def test_a_row_the_task_cannot_read_names_the_file_and_the_row(tmp_path):
    path = tmp_path / "results.json"
    path.write_text(json.dumps([{"image_id": 100, "category_id": 1, "bbox": [2, 2, 6, 6], "score": 0.5}]))
    with pytest.raises(DataError, match=r"results\.json: results row 0 .*: category_id 1 is not in the dataset"):
        evaluate_rows(box_evaluator(), path)


def test_metrics_files_round_trip(tmp_path):
    metrics = {"toy/task/AP": Metric(12.5), "toy/task/RMSE": Metric(0.0, higher_is_better=False, reason="no pixels")}
    write_metrics(tmp_path, metrics)
    assert read_metrics(tmp_path) == metrics


def test_what_cannot_be_written_leaves_the_old_file(tmp_path):
    path = tmp_path / "folder" / "metrics.json"
    write_json(path, {"old": 1.0})
    with pytest.raises(ValueError, match=r"metrics\.json: not written"):
        write_json(path, {"new": float("nan")})
    assert json.loads(path.read_text()) == {"old": 1.0}
    assert [entry.name for entry in path.parent.iterdir()] == ["metrics.json"]


def test_a_folder_that_cannot_be_made_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(MtlRcnnError, match=r"file/metrics\.json: cannot be written"):
        write_json(tmp_path / "file" / "metrics.json", {})


def test_a_write_that_fails_half_way_leaves_no_temporary_file(tmp_path):
    (tmp_path / "metrics.json").mkdir()
    with pytest.raises(MtlRcnnError, match=r"metrics\.json: cannot be written"):
        write_json(tmp_path / "metrics.json", {})
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.json"]
