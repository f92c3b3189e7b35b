"""Two data sets with other classes, in another order, under other names and ids, in one run: they train together, what
one does not label is no background of its, and evaluation speaks each one's own language."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from omegaconf import DictConfig
from tiny import tiny_config
from toy import Toy

from mtl_rcnn.data.catalog import Dataset, build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.engine.build import build_evaluators, build_model, build_targets
from mtl_rcnn.engine.data import build_planner
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import DataError

ALIASES = {"ring": "disc"}
OTHER = {9: (1, "square"), 5: (7, "ring")}
"""Category id of the toy data set -> id and name in the other data set, which has no figures."""


def write_other(toy: Toy) -> Path:
    """The same images, whose squares and discs are annotated under other names and numbers."""
    content = json.loads(toy.boxes.read_text())
    content["categories"] = [{"id": number, "name": name} for number, name in OTHER.values()]
    kept = [entry for entry in content["annotations"] if entry["category_id"] in OTHER]
    content["annotations"] = [{**entry, "category_id": OTHER[entry["category_id"]][0]} for entry in kept]
    path = toy.root / "other.json"
    path.write_text(json.dumps(content))
    return path


def nodes(toy: Toy) -> list[dict[str, Any]]:
    """Both data sets' entries in a configuration."""
    return [
        {"name": "toy", "images": str(toy.images), "annotations": [str(toy.boxes)]},
        {"name": "other", "images": str(toy.images), "annotations": [str(write_other(toy))]},
    ]


def configuration(toy: Toy, folder: Path, *overrides: str) -> DictConfig:
    """A few iterations on both."""
    small = [
        *(
            "solver.batch_size=4",
            "solver.max_iter=3",
            "solver.steps=[]",
            "solver.warmup_iters=0",
            "solver.log_period=1",
        ),
        *("solver.eval_period=0", "solver.checkpoint_period=0", "data.workers=0", "device=cpu", "threads=1"),
        *("data.train_augment.resize.short_edge_length=[48]", "data.test_augment.resize.short_edge_length=48"),
        *("report.enabled=false", "evaluation.samples=0", "+data.aliases.ring=disc", f"output_dir={folder}"),
    ]
    both = json.dumps(nodes(toy)).replace('"', "")
    return tiny_config(("detection", "mask"), f"data.train={both}", f"data.val={both}", *small, *overrides)


def read(toy: Toy, space: LabelSpace | None = None) -> tuple[list[Dataset], LabelSpace]:
    return build_datasets([DatasetSpec.from_config(node) for node in nodes(toy)], ALIASES, space)


def test_classes_merge_by_name_and_alias(toy: Toy) -> None:
    (one, other), space = read(toy)
    assert space.classes == ("figure", "disc", "square")
    assert [record["classes"] for record in (one.records[0], other.records[0])] == [(0, 1, 2), (1, 2)]
    assert other.records[0]["category_ids"] == (7, 1)
    of_id = {entry["id"]: entry["category_id"] for record in one.records for entry in record["annotations"]}
    for record in other.records:
        for entry in record["annotations"]:
            assert entry["category_id"] == of_id[entry["id"]]


def test_the_order_of_data_sets_changes_numbers_and_no_meaning(toy: Toy) -> None:
    specs = [DatasetSpec.from_config(node) for node in reversed(nodes(toy))]
    (other, one), space = build_datasets(specs, ALIASES)
    assert space.classes == ("square", "disc", "figure")
    names = {
        dataset.name: {
            entry["id"]: space.classes[entry["category_id"]] for r in dataset.records for entry in r["annotations"]
        }
        for dataset in (one, other)
    }
    assert names["other"] == {number: names["toy"][number] for number in names["other"]}


def test_samples_say_which_classes_their_data_set_labels(toy: Toy, tmp_path: Path) -> None:
    cfg = configuration(toy, tmp_path)
    datasets, space = read(toy)
    mapper = Mapper(build_targets(cfg, space), [])
    labelled = [mapper(dataset.records[0], 0)["labelled_classes"].tolist() for dataset in datasets]
    assert labelled == [[True, True, True], [False, True, True]]


@pytest.mark.parametrize("method", ["null", "uniform"])
def test_both_train_and_are_evaluated_in_their_own_words(method: str, toy: Toy, tmp_path: Path) -> None:
    outcome = train(
        configuration(toy, tmp_path / "run", f"data.mixing.method={method}", "tasks.detection.score_thresh=0")
    )
    for name in ("toy/detection/AP", "other/mask/AP", "toy/detection/AP/figure", "other/detection/AP/disc"):
        assert 0 <= outcome.metrics[name].value <= 100
    assert "other/detection/AP/figure" not in outcome.metrics
    predictions = outcome.folder / "predictions"
    own = {"toy": {2, 5, 9}, "other": {1, 7}}
    for dataset, ids in own.items():
        rows = json.loads((predictions / f"{dataset}_detection.json").read_text())
        assert rows
        assert {row["category_id"] for row in rows} <= ids


def test_each_scores_full_marks_on_its_own_truth(toy: Toy, tmp_path: Path) -> None:
    cfg = configuration(toy, tmp_path)
    datasets, space = read(toy)
    targets = build_targets(cfg, space)
    mapper = Mapper(targets, [])
    for dataset in datasets:
        evaluator = build_evaluators(cfg, space, dataset.records)["detection"]
        samples = [mapper(record, index) for index, record in enumerate(dataset.records)]
        predictions = [targets["detection"].as_prediction(sample) for sample in samples]
        rows = [row for pair in zip(dataset.records, predictions) for row in evaluator.rows(*pair)]
        metrics = evaluator.metrics(rows)
        assert metrics["AP"].value == pytest.approx(100)
        assert "AP/disc" in metrics


def test_a_figure_is_no_background_where_nobody_annotates_figures(toy: Toy, tmp_path: Path) -> None:
    """The gradient of the class logits of background regions: the other data set's push no probability away from
    figures, those of the toy data set do."""
    cfg = configuration(toy, tmp_path)
    (one, other), space = read(toy)
    model = build_model(cfg, space).train()
    mapper = Mapper(build_targets(cfg, space), [])
    logits: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, given: Any, raw: tuple[torch.Tensor, torch.Tensor]) -> None:
        raw[0].retain_grad()
        logits.append(raw[0])

    model.roi_heads.detector.register_forward_hook(keep)
    for dataset, pushed in ((one, True), (other, False)):
        record = next(record for record in dataset.records if record["image_id"] == 14)  # labelled, and empty
        sums, _ = model([mapper(record, 0)])
        sums["detection/cls"][0].backward()
        figure, background = logits[-1].grad[:, 0], logits[-1].grad[:, -1]
        assert (background < 0).all()
        assert (figure > 0).all() == pushed
        assert (figure < 0).all() == (not pushed)


def test_a_network_without_the_class_says_so(toy: Toy) -> None:
    with pytest.raises(DataError, match=r"annotates classes that the network does not know: figure \(4 annotations\)"):
        read(toy, LabelSpace(({"name": "square"}, {"name": "disc"})))


def test_a_mixture_of_them_holds_its_shares(toy: Toy, tmp_path: Path) -> None:
    cfg = configuration(
        toy, tmp_path, "data.mixing.method=ratios", "+data.mixing.ratios.toy=1", "+data.mixing.ratios.other=3"
    )
    plan = build_planner(cfg, read(toy)[0])
    drawn = [record for index in range(250) for _, record in plan.batch(index)]
    assert sum(record >= 6 for record in drawn) == pytest.approx(750, abs=5)
