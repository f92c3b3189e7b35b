"""Confusions, curves and errors per image on a case made by hand, and their files."""

from __future__ import annotations

import csv

import numpy as np
import pytest

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.evaluation.analysis import ImageErrors, write_analysis
from mtl_rcnn.evaluation.coco_evaluator import CocoEvaluator, View
from mtl_rcnn.evaluation.confusion import Confusion
from mtl_rcnn.evaluation.evaluator import class_indices

LABELS = LabelSpace(({"name": "cat"}, {"name": "dog"}, {"name": "cow"}, {"name": "emu"}))
A, B, C, FAR = [10, 10, 40, 40], [60, 10, 40, 40], [110, 10, 40, 40], [160, 60, 20, 20]


class Boxes(CocoEvaluator):
    def rows(self, record, prediction):
        raise NotImplementedError

    def views(self):
        return [View("bbox")]


def record(image_id, *objects):
    annotations = [
        {"id": n, "category_id": index, "bbox": box, "iscrowd": crowd}
        for n, (index, box, crowd) in enumerate(objects, start=1)
    ]
    base = {"file_name": f"{image_id}.jpg", "height": 100, "width": 200, "image_id": image_id, "dataset": "toy"}
    return {**base, "classes": (0, 1, 2, 3), "category_ids": (10, 11, 12, 13), "annotations": annotations}


def row(image_id, class_index, box, score=0.9):
    return {"image_id": image_id, "category_id": 10 + class_index, "bbox": box, "score": score}


RECORDS = [
    record("right", (0, A, 0), (1, B, 0)),
    record("mixed", (0, A, 0), (0, B, 0), (2, C, 0), (1, FAR, 1)),
    record("empty"),
]
ROWS = [
    row("right", 0, A),
    row("right", 1, B),
    row("mixed", 0, A),
    row("mixed", 1, B),  # a cat taken for a dog
    row("mixed", 1, FAR),  # in a crowd: neither right nor wrong
    row("mixed", 0, FAR),  # takes the crowd too when classes do not matter; a false alarm when they do
    row("empty", 0, C),  # a false alarm
    row("empty", 0, C, 0.2),  # below the threshold of its class
]


@pytest.fixture
def analysis():
    return Boxes("boxes", LABELS, RECORDS).score(ROWS).analysis


def test_confusions(analysis):
    assert analysis.thresholds == {"cat": 0.9, "dog": 0.9, "cow": 0.9}
    assert analysis.confusion.names == ("cat", "dog", "cow", "background")
    assert analysis.confusion.counts.tolist() == [
        [2, 1, 0, 0],  # cats: two found, one taken for a dog
        [0, 1, 0, 0],
        [0, 0, 0, 1],  # the cow is missed
        [1, 0, 0, 0],  # a cat where nothing is
    ]
    assert analysis.confusion.mistaken() == ["'cat' is detected as 'dog' (1 of 3)"]


def test_errors_per_image_come_worst_first(analysis):
    assert analysis.images == [
        ImageErrors("empty", found=0, missed=0, false=1),
        ImageErrors("mixed", found=1, missed=2, false=2),
        ImageErrors("right", found=2, missed=0, false=0),
    ]
    assert [image.f1 for image in analysis.images] == [0.0, pytest.approx(2 / 6), 1.0]


def test_an_image_without_objects_and_detections_is_flawless():
    assert ImageErrors("quiet", 0, 0, 0).f1 == 1.0


def test_curves_average_to_ap50():
    scored = Boxes("boxes", LABELS, RECORDS).score(ROWS)
    assert set(scored.analysis.curves) == {"cat", "dog", "cow"}
    for name, curve in scored.analysis.curves.items():
        assert 100 * curve.precision.mean() == pytest.approx(scored.metrics[f"AP50/{name}"].value, abs=1e-12)
    # Two of three cats among four detections of 0.9: precision 1/2 up to recall 2/3, nothing beyond.
    cat = scored.analysis.curves["cat"]
    assert set(cat.precision[cat.recall <= 2 / 3]) == {0.5}
    assert not cat.precision[cat.recall > 2 / 3].any()
    assert cat.score[0] == 0.9


def test_files_hold_the_same(analysis, tmp_path):
    paths = write_analysis(tmp_path, "toy", "boxes", analysis)

    assert [path.name for path in paths] == ["toy_boxes_curves.csv", "toy_boxes_confusion.csv", "toy_boxes_images.csv"]
    curves, confusion, images = (list(csv.reader(path.open())) for path in paths)
    assert confusion[0] == ["truth \\ detected", "cat", "dog", "cow", "background"]
    assert [line[1:] for line in confusion[1:]] == [list(map(str, line)) for line in analysis.confusion.counts.tolist()]
    assert images[1:3] == [["empty", "0", "0", "1", "0.0000"], ["mixed", "1", "2", "2", "0.3333"]]
    assert curves[0] == ["class", "recall", "precision", "score"]
    assert len(curves) == 1 + 3 * 101
    assert curves[1][:2] == ["cat", "0.00"]


def test_a_subset_of_classes_is_scored_alone():
    evaluator = Boxes("boxes", LABELS, RECORDS)
    evaluator.classes = class_indices(LABELS, ["dog"], "evaluation.classes")
    scored = evaluator.score(ROWS)

    assert {name.split("/")[1] for name in scored.metrics if "/" in name} == {"dog"}
    assert scored.metrics["AP"].value == scored.metrics["AP/dog"].value
    assert scored.analysis.confusion.names == ("dog", "background")
    assert scored.metrics == evaluator.metrics(ROWS)


def test_an_unknown_class_is_one_clear_error():
    with pytest.raises(ConfigError, match=r"evaluation\.classes: the network has no class 'cta'; did you mean 'cat'\?"):
        class_indices(LABELS, ["cta"], "evaluation.classes")
    with pytest.raises(ConfigError, match="no class 'zebra'; classes are cat, dog, cow, emu"):
        class_indices(LABELS, ["zebra"], "evaluation.classes")


def test_views_without_a_class_to_score_say_so():
    class Cows(Boxes):
        def views(self):
            return [View("bbox", classes=(2,))]

    evaluator = Cows("cows", LABELS, RECORDS)
    evaluator.classes = (0,)
    scored = evaluator.score(ROWS)
    assert scored.analysis is None
    assert scored.metrics["AP"].value == 0.0
    assert "none of the classes to score is one of the task 'cows'" in scored.metrics["AP"].reason


def test_several_views_are_averaged_and_keep_their_classes():
    class Twice(Boxes):
        def views(self):
            return [View("bbox", classes=(0,)), View("bbox", classes=(1, 2))]

    scored = Twice("twice", LABELS, RECORDS).score(ROWS)
    parts = [Boxes("boxes", LABELS, RECORDS) for _ in range(2)]
    parts[0].classes, parts[1].classes = (0,), (1, 2)
    first, second = (part.metrics(ROWS) for part in parts)
    assert scored.metrics["AP"].value == pytest.approx((first["AP"].value + second["AP"].value) / 2)
    assert scored.metrics["AP/dog"] == second["AP/dog"]
    assert scored.metrics["AP75/cat"].value == first["AP75"].value
    assert set(scored.analysis.curves) == {"cat", "dog", "cow"}
    assert scored.analysis.images[0].image_id == "empty"


def test_mistakes_are_named_from_the_commonest_on():
    counts = np.array([[5, 3, 0, 1], [9, 0, 0, 0], [0, 0, 4, 0], [2, 2, 2, 0]])
    assert Confusion(("a", "b", "c", "background"), counts).mistaken() == [
        "'b' is detected as 'a' (9 of 9)",
        "'a' is detected as 'b' (3 of 9)",
    ]
