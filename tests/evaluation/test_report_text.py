"""The report's tables, character by character where it matters."""

from __future__ import annotations

from mtl_rcnn.evaluation.evaluator import Metric
from mtl_rcnn.evaluation.report import report_text


def test_tasks_with_common_metrics_share_a_table_and_missing_ones_are_dashes():
    metrics = {
        "val/a/AP": Metric(41.234),
        "val/a/APs": Metric(7.0),
        "val/b/AP": Metric(9.5),
        "val/c/RMSE": Metric(0.5321, higher_is_better=False),
    }
    assert report_text(metrics).splitlines() == [
        "dataset  task     AP    APs",
        "val      a     41.23  7.000",
        "val      b      9.50      -",
        "",
        "dataset  task  RMSE ↓",
        "val      c      0.532",
    ]


def test_classes_stand_in_columns_that_fit_the_width():
    metrics = {"val/a/AP": Metric(50.0)}
    metrics |= {f"val/a/{kind}/class{n}": Metric(10.0 * n) for kind in ("AP", "AP50") for n in range(1, 6)}

    lines = report_text(metrics, width=46).splitlines()

    assert lines[3:] == [
        "val/a per class",
        "class      AP   AP50 | class      AP   AP50",
        "class1  10.00  10.00 | class4  40.00  40.00",
        "class2  20.00  20.00 | class5  50.00  50.00",
        "class3  30.00  30.00 |",
    ]
    assert max(len(line) for line in report_text(metrics, width=20).splitlines()[4:]) == 20


def test_reasons_stand_below_once_each():
    metrics = {
        "val/a/AP": Metric(0.0, reason="no detections in 3 images"),
        "val/a/AP50": Metric(0.0, reason="no detections in 3 images"),
        "val/a/AP/cat": Metric(0.0, reason="no detections of this class"),
        "val/a/AP50/cat": Metric(0.0, reason="no detections of this class"),
    }
    assert report_text(metrics).splitlines() == [
        "dataset  task     AP   AP50",
        "val      a     0.000  0.000",
        "",
        "val/a: no detections in 3 images (AP, AP50)",
        "val/a: no detections of this class (cat)",
    ]


def test_nothing_to_report():
    assert report_text({}) == "no metrics"


def test_a_name_whose_values_go_both_ways_has_two_columns():
    metrics = {
        "toy/task/gt/accuracy": Metric(90.0),
        "toy/task/gt/error": Metric(3.0, higher_is_better=False),
    }
    header, first, second = report_text(metrics, width=30).splitlines()[-3:]
    assert header.split() == ["class", "gt", "gt", "↓"]
    assert first.split() == ["accuracy", "90.00", "-"]
    assert second.split() == ["error", "-", "3.000"]
