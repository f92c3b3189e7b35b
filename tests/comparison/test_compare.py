"""A whole comparison on the toy images: its files, what is not repeated, what fails."""

from __future__ import annotations

import csv
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from tiny import NETWORK, TASKS, need_tasks
from toy import Toy, write_toy

from mtl_rcnn.comparison.compare import compare_tasks
from mtl_rcnn.config.compose import Composition, config_root
from mtl_rcnn.errors import ConfigError, TrainingError

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

CHOSEN = ("semantic", "depth")


def words(toy: Toy, folder: Path, *overrides: str) -> list[str]:
    data = f"{{name: toy, images: {toy.images}, annotations: [{toy.boxes}]}}"
    return [
        *(f"tasks=[{','.join(CHOSEN)}]", "data.root=unused", *NETWORK, *(k for task in CHOSEN for k in TASKS[task])),
        *(f"data.train=[{data}]", f"data.val=[{data}]", f"output_dir={folder}", "seeds=1", "images=1", "threads=1"),
        *("solver.batch_size=2", "solver.max_iter=2", "solver.steps=[]", "solver.warmup_iters=0", "solver.lr=0.005"),
        *("solver.log_period=1", "solver.eval_period=1", "data.workers=0", "device=cpu", "evaluation.samples=0"),
        *("data.train_augment.resize.short_edge_length=[48]", "data.test_augment.resize.short_edge_length=48"),
        *("report.enabled=false", *overrides),
    ]


def compare(overrides: Sequence[str]) -> Path:
    return compare_tasks(Composition("compare", tuple(overrides), str(config_root())))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Toy, Path]:
    need_tasks(*CHOSEN)
    folder = tmp_path_factory.mktemp("comparison")
    toy = write_toy(folder / "toy")
    return toy, compare(words(toy, folder / "out"))


def test_the_report_tells_what_the_trainings_left(finished: tuple[Toy, Path]) -> None:
    _, folder = finished
    rows = list(csv.DictReader((folder / "trainings.csv").open(encoding="utf-8")))
    assert [row["network"] for row in rows] == ["depth", "semantic", "depth + semantic, sum"]
    left = {
        name: json.loads((folder / "runs" / f"{name}_seed0" / "metrics.json").read_text())
        for name in ("depth", "all-sum")
    }
    assert float(rows[0]["depth/rmse"]) == pytest.approx(left["depth"]["toy/depth/rmse"], rel=1e-5)
    both, own = (left[name]["toy/depth/rmse"] for name in ("all-sum", "depth"))
    assert float(rows[2]["term/depth"]) == pytest.approx(100 * (own - both) / own, rel=1e-3, abs=1e-4)
    assert int(rows[2]["parameters"]) > int(rows[0]["parameters"]) > 0
    assert float(rows[2]["inference_ms_per_image"]) > 0
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "one seed: what of this is noise cannot be told" in text
    assert "| one network per task (2) |" in text


def test_the_page_opens_without_a_network(finished: tuple[Toy, Path]) -> None:
    text = (finished[1] / "report.html").read_text(encoding="utf-8")
    sources = re.findall(r'(?:src|href)="([^"]*)"', text)
    assert {source.split(":")[0][:1] for source in sources} <= {"d", "#"}
    assert sum(source.startswith("data:image/jpeg") for source in sources) == 3
    assert text.count("<polyline") >= 4


def test_what_is_complete_is_not_trained_again_and_the_budget_is_kept(finished: tuple[Toy, Path]) -> None:
    toy, folder = finished
    before = {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/cell.json")}
    assert len(before) == 3
    compare(words(toy, folder, "threads=2"))  # what does not change the numbers may change
    assert {path: path.stat().st_mtime_ns for path in folder.glob("runs/*/cell.json")} == before
    with pytest.raises(ConfigError, match=r"depth_seed0 was begun with other settings.*solver.max_iter: 2 -> 3"):
        compare(words(toy, folder, "solver.max_iter=3"))


def test_a_cell_is_trained_alone_from_its_configuration(finished: tuple[Toy, Path], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "mtl_rcnn.train", f"--config-dir={finished[1] / 'configs'}"]
    done = subprocess.run(
        [*command, "--config-name=all-sum_seed0", f"output_dir={tmp_path}"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    mine, theirs = (
        json.loads((f / "metrics.json").read_text()) for f in (tmp_path, finished[1] / "runs/all-sum_seed0")
    )
    assert mine == theirs


def test_a_failure_is_told_and_the_rest_is_reported(finished: tuple[Toy, Path]) -> None:
    toy, folder = finished
    wild = '+variants.wild=["solver.lr=1e30","solver.clip_gradients=null"]'
    with pytest.raises(TrainingError, match=r"3 of 4 trainings are complete; these failed:\n  all-wild_seed0: ended"):
        compare(words(toy, folder, wild, "images=0"))
    assert "| depth + semantic, sum |" in (folder / "report.md").read_text(encoding="utf-8")
    assert "error" in (folder / "runs" / "all-wild_seed0" / "console.txt").read_text(encoding="utf-8")


def test_a_metric_that_does_not_exist_is_told_with_those_that_do(finished: tuple[Toy, Path]) -> None:
    toy, folder = finished
    with pytest.raises(
        ConfigError, match=r"metrics.depth=toy/depth/rmsee: no such metric; did you mean toy/depth/rmse"
    ):
        compare(words(toy, folder, "+metrics.depth=rmsee"))
