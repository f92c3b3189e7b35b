"""All tasks in one network, and each task on whole images alone: trained, evaluated, drawn, exported."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
from omegaconf import DictConfig, OmegaConf
from PIL import Image
from test_train import toy_config
from tiny import available_tasks, region_tasks
from toy import SIZES, Toy

from mtl_rcnn import runtime
from mtl_rcnn.config import compose
from mtl_rcnn.engine.build import task_classes
from mtl_rcnn.engine.check import check
from mtl_rcnn.engine.evaluate import evaluate_checkpoint
from mtl_rcnn.engine.gallery import visualize_data
from mtl_rcnn.engine.report import report_run
from mtl_rcnn.engine.train import train
from mtl_rcnn.export.export import export_checkpoint
from mtl_rcnn.predict.run import predict_images

TASKS = tuple(available_tasks())
ALONE = tuple(name for name in TASKS if name not in region_tasks())


@pytest.fixture(params=[TASKS, *((name,) for name in ALONE)], ids=["all", *ALONE])
def trained(request: pytest.FixtureRequest, toy: Toy, tmp_path: Path) -> tuple[DictConfig, Path]:
    """A run of two steps, with its report."""
    more = ["solver.max_iter=2", "report.enabled=true", "report.images=2", "evaluation.pictures=true"]
    # The certificate wants an input on which nothing is found; a network of two steps is sure of nothing.
    knobs = ["tasks.detection.score_thresh=0.3"] if "detection" in request.param else []
    cfg = toy_config(toy, tmp_path / "run", *more, *knobs, tasks=request.param)
    return cfg, train(cfg).folder


@pytest.mark.slow
def test_from_training_to_the_exported_network(
    trained: tuple[DictConfig, Path],
    toy: Toy,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
) -> None:
    cfg, run = trained
    classes = task_classes(cfg)
    metrics = json.loads((run / "metrics.json").read_text())
    assert {f"toy/{name}/{kind.evaluator_class.headline}" for name, kind in classes.items()} <= set(metrics)
    assert (run / "report.html").read_text().count("data:image/") >= 2
    _check_evaluation(run, metrics)
    _check_predictions(run, toy, tmp_path / "predicted", set(classes))
    capsys.readouterr()
    for method in ("trace", "script"):
        folder = tmp_path / method
        more = [f"export.method={method}", f"output_dir={folder}", "certificate.min_detections=0"]
        manifest = export_checkpoint(compose("export", [f"run={run}", *more]))
        assert set(manifest["tasks"]) == set(classes)
        assert "largest difference" in capsys.readouterr().out
        monkeypatch.setattr(sys, "argv", ["runtime.py", str(folder / "model.ts"), str(toy.images / "11.png")])
        runtime.main()
        said = capsys.readouterr().out
        assert set(json.loads(said)) == {output["name"] for output in manifest["outputs"]}
        assert len(said) < 60_000
        _check_sizes(folder, toy, manifest)


@pytest.mark.parametrize("tasks", [TASKS, *((name,) for name in ALONE)], ids=["all", *ALONE])
def test_data_are_checked_and_shown(tasks: tuple[str, ...], toy: Toy, tmp_path: Path) -> None:
    cfg = toy_config(toy, tmp_path / "run", tasks=tasks)
    OmegaConf.set_struct(cfg, False)
    cfg.merge_with({"split": "train", "number": 4, "picture": str(tmp_path / "data.png")})
    with Image.open(visualize_data(cfg)) as drawn:
        assert min(drawn.size) >= 400
    cfg.merge_with({"report_dir": str(tmp_path / "check"), "fix_dir": None, "dry_run": True})
    cfg.merge_with({"dry_run_images": 2, "dry_run_steps": 2})
    report = check(cfg)
    assert {row.task for row in report.coverage} == set(tasks)
    assert not [found for source in report.sources for found in source.faults]


def _check_evaluation(run: Path, trained: dict[str, float]) -> None:
    """Again, the same; and with views, other."""
    common = [f"run={run}", "device=cpu", "workers=0"]
    again = evaluate_checkpoint(compose("evaluate", [*common, "pictures=true"]))
    assert {name: metric.value for name, metric in again.items()} == pytest.approx(trained, nan_ok=True)
    views = ["tta.scales=[48,56]", "tta.flip=true", "pictures=false", f"output_dir={run.parent / 'views'}"]
    seen = evaluate_checkpoint(compose("evaluate", [*common, *views]))
    assert {name.split("/")[1] for name in seen} == {name.split("/")[1] for name in again}
    assert report_run(compose("report", [f"run={run}", "images=1", "device=cpu"])).is_file()


def _check_predictions(run: Path, toy: Toy, folder: Path, tasks: set[str]) -> None:
    where = [f"network={run}", f"input={toy.images}", f"output_dir={folder}", "device=cpu", "workers=0"]
    predict_images(compose("predict", [*where, "score_threshold=0.01"]))
    assert {path.name for path in (folder / "predictions").glob("images_*.json")} == {
        f"images_{task}.json" for task in tasks
    }
    for image_id in SIZES:
        with Image.open(folder / "drawings" / f"{image_id}.png") as drawn:
            assert min(drawn.size) >= 400


def _check_sizes(folder: Path, toy: Toy, manifest: dict) -> None:
    """Maps have the size of the image that came in."""
    network = runtime.ExportedNetwork(folder)
    image = network.read(toy.images / "12.png")
    found = network(image)
    for output in manifest["outputs"]:
        value = found[output["name"]]
        assert str(value.dtype) == f"torch.{output['dtype']}"
        if output["shape"].endswith("H, W)"):
            assert value.shape[-2:] == image.shape[-2:]
