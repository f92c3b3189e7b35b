"""What trackers receive, by packages made up for the test; and runs that go on without them."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.engine.progress import Writers
from mtl_rcnn.engine.trackers import build_trackers

PICTURES = {"val 7": np.zeros((4, 6, 3), dtype=np.uint8)}


class Calls(list):
    """Notes every call as (name, positional arguments, keyword arguments)."""

    def noting(self, name: str, result: Any = None) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.append((name, args, kwargs))
            return result

        return call

    def of(self, name: str) -> list[tuple[tuple, dict]]:
        return [(args, kwargs) for called, args, kwargs in self if called == name]


@pytest.fixture
def calls() -> Calls:
    return Calls()


@pytest.fixture
def wandb(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    run = SimpleNamespace(id="abc123", log=calls.noting("log"), finish=calls.noting("finish"))
    module = SimpleNamespace(init=calls.noting("init", run), Image=lambda image, caption: (caption, image.shape))
    monkeypatch.setitem(sys.modules, "wandb", module)
    return module


@pytest.fixture
def mlflow(calls: Calls, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    names = ("set_tracking_uri", "set_experiment", "log_dict", "log_metrics", "log_image", "end_run")
    names = (*names, "create_experiment", "get_experiment_by_name")
    module = SimpleNamespace(**{name: calls.noting(name) for name in names})
    module.start_run = calls.noting("start_run", SimpleNamespace(info=SimpleNamespace(run_id="run7")))
    monkeypatch.setitem(sys.modules, "mlflow", module)
    return module


def config(*names: str) -> DictConfig:
    trackers = {"names": list(names), "project": "toys", "offline": True, "mlflow_uri": None}
    return OmegaConf.create({"trackers": trackers, "solver": {"lr": 0.5}})


def feed(writers: Writers) -> None:
    with writers:
        writers.write(20, {"total": 1.5, "bad": float("nan"), "val/task/AP/baseball (bat)": 3.0}, {"img_per_s": 2.0})
        writers.write_images(20, PICTURES)


def test_wandb_gets_everything_offline_and_goes_on_after_a_resume(wandb: Any, calls: Calls, tmp_path: Path) -> None:
    folder = tmp_path / "my_run"
    folder.mkdir()
    feed(Writers(build_trackers(config("wandb"), folder)))

    ((_, init),) = calls.of("init")
    assert (init["project"], init["name"], init["dir"], init["mode"]) == ("toys", "my_run", str(folder), "offline")
    assert init["id"] is None
    assert init["config"]["solver"] == {"lr": 0.5}
    (scalars, step), (pictures, picture_step) = [(args[0], kwargs["step"]) for args, kwargs in calls.of("log")]
    assert scalars == {"total": 1.5, "val/task/AP/baseball _bat_": 3.0, "time/img_per_s": 2.0}
    assert (step, picture_step) == (20, 20)
    assert pictures == {"predictions": [("val 7", (4, 6, 3))]}
    assert len(calls.of("finish")) == 1

    assert json.loads((folder / "trackers.json").read_text()) == {"wandb": "abc123"}
    build_trackers(config("wandb"), folder)
    resumed = calls.of("init")[1][1]
    assert (resumed["id"], resumed["resume"]) == ("abc123", "allow")


def test_mlflow_gets_everything_without_a_server(mlflow: Any, calls: Calls, tmp_path: Path) -> None:
    feed(Writers(build_trackers(config("mlflow"), tmp_path)))

    assert calls.of("set_tracking_uri") == [((f"sqlite:///{tmp_path / 'mlruns.db'}",), {})]
    assert calls.of("create_experiment") == [(("toys",), {"artifact_location": (tmp_path / "mlruns").as_uri()})]
    assert calls.of("set_experiment") == [(("toys",), {})]
    assert calls.of("start_run") == [((), {"run_id": None, "run_name": tmp_path.name})]
    ((config_logged, name), _) = calls.of("log_dict")[0]
    assert (config_logged["solver"], name) == ({"lr": 0.5}, "config.yaml")
    assert calls.of("log_metrics") == [
        (({"total": 1.5, "val/task/AP/baseball _bat_": 3.0, "time/img_per_s": 2.0},), {"step": 20})
    ]
    ((image, place), _) = calls.of("log_image")[0]
    assert image.shape == (4, 6, 3)
    assert place == "predictions/0000020_0.png"
    assert len(calls.of("end_run")) == 1
    build_trackers(config("mlflow"), tmp_path)
    assert calls.of("start_run")[1][1]["run_id"] == "run7"
    assert len(calls.of("log_dict")) == 1


def test_a_missing_package_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it raises ImportError
    assert build_trackers(config("wandb"), tmp_path) == []
    assert [record.getMessage() for record in caplog.records] == [
        "wandb is not installed: the run is not tracked there (pip install 'mtl-rcnn[wandb]')"
    ]


def test_a_tracker_that_cannot_start_or_fails_later_is_one_line_each(
    wandb: Any, calls: Calls, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("disk\nfull")

    writers = Writers(build_trackers(config("wandb"), tmp_path))
    writers.writers[0]._tracker._run.log = fail
    feed(writers)
    feed(writers)
    wandb.init = fail
    assert build_trackers(config("wandb"), tmp_path) == []
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.WARNING, "wandb failed, the run goes on without it: disk full"),
        (logging.WARNING, "wandb cannot be started, the run goes on without it: disk full"),
    ]
    assert not calls.of("finish")
