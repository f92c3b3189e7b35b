"""Every method of configs/balancing can be built, stands in docs/balancing.md, and goes into a run and out again."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from test_train import toy_config
from tiny import need_tasks, tiny_config
from toy import Toy

from mtl_rcnn.balancing import Scalarizer
from mtl_rcnn.config import compose
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.balance import build_balancer
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.train import train
from mtl_rcnn.errors import ConfigError

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ROOT = Path(__file__).resolve().parents[2]
METHODS = sorted(path.stem for path in (ROOT / "configs" / "balancing").glob("*.yaml"))
PAGE = (ROOT / "docs" / "balancing.md").read_text(encoding="utf-8") if (ROOT / "docs").is_dir() else None
TASKS = ("semantic", "depth")


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_built_and_documented(method: str) -> None:
    cfg = tiny_config(("detection",), f"balancing={method}")
    balancer = build_balancer(cfg, SimpleNamespace(loss_names=lambda: ["a/x", "b/x", "b/y"]), None)
    assert isinstance(balancer, Scalarizer)
    assert type(balancer).__doc__
    if PAGE is None:
        pytest.skip("this copy of the project has no docs")
    (row,) = [line for line in PAGE.splitlines() if line.startswith(f"| `{method}` |")]
    knobs = set(cfg.balancing) - {"_target_", "weights"}
    assert {knob for knob in knobs if f"`{knob}`" not in row} <= {"seed", "at"}


def test_a_method_that_does_not_exist_is_told_with_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"balancing.*upgard"):
        compose("train", ["tasks=[detection]", "data.root=x", "balancing=upgard"])


@pytest.mark.parametrize(
    "method",
    [
        ("uncertainty",),
        ("dwa", "balancing.period=1"),
        ("famo", "balancing.every=1"),
        ("pcgrad",),
        ("gradnorm", "balancing.start=1"),
        ("gradnorm", "balancing.start=1", "balancing.at=parameters", "solver.accumulate=2"),
    ],
    ids=" ".join,
)
def test_a_run_resumes_with_the_methods_state(method: tuple[str, ...], toy: Toy, tmp_path: Path) -> None:
    need_tasks(*TASKS)

    def run(folder: str, iterations: int) -> Path:
        options = [f"balancing={method[0]}", *method[1:], f"solver.max_iter={iterations}"]
        options += ["solver.steps=[]", "data.val=[]", "solver.warmup_iters=0"]
        return train(toy_config(toy, tmp_path / folder, *options, tasks=TASKS)).folder

    whole = run("whole", 4)
    run("cut", 2)
    cut = run("cut", 4)
    one, other = (checkpoints.load(folder / "model_0000004.pth") for folder in (whole, cut))
    assert all(torch.equal(tensor, other["model"][name]) for name, tensor in one["model"].items())
    rows, again = (
        [row for row in read_metrics(folder / "metrics.jsonl") if row["iteration"] == 4] for folder in (whole, cut)
    )
    assert {"weight/semantic", "weight/depth"} <= set(rows[0])
    assert {name: rows[0][name] for name in rows[0] if not name.startswith("time/")} == {
        name: again[0][name] for name in again[0] if not name.startswith("time/")
    }
