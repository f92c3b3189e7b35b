"""Which networks a comparison trains, and with which configuration."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import need_tasks

from mtl_rcnn.comparison.plan import Network, plan_cells, plan_networks, without_tasks
from mtl_rcnn.config import compose
from mtl_rcnn.config.compose import Composition, config_root
from mtl_rcnn.errors import ConfigError


def plan(*overrides: str, tasks: str = "detection,mask,keypoint") -> list[Network]:
    need_tasks(*tasks.split(","))
    words = (f"tasks=[{tasks}]", "data.root=x", *overrides)
    return plan_networks(Composition("compare", words, str(config_root())))


def test_each_tasks_own_network_has_what_it_works_on_and_comes_before_all() -> None:
    networks = plan(tasks="detection,mask,keypoint,depth")
    assert {n.own_of: set(n.tasks) for n in networks if n.own_of} == {
        "detection": {"detection"},
        "mask": {"detection", "mask"},
        "keypoint": {"detection", "keypoint"},
        "depth": {"depth"},
    }
    assert [set(n.cfg.tasks) for n in networks] == [set(n.tasks) for n in networks]
    assert set(networks[-1].tasks) == {"detection", "mask", "keypoint", "depth"}
    assert networks[-1].method == "sum"


def test_subsets_and_methods_and_variants_are_networks() -> None:
    networks = plan(
        "subsets=[[detection,mask],[mask,detection]]",
        "methods=[sum,pcgrad]",
        '+variants={often: ["solver.lr=0.5"], famous: ["balancing=famo", "solver.lr=0.25"]}',
    )
    assert [n.method for n in networks if n.method] == ["sum", "pcgrad", "often", "famous"]
    assert len(networks) == 3 + 4  # the subset is the mask's own network
    kinds = {n.method: n.cfg.balancing._target_.rsplit(".", 1)[-1] for n in networks}
    assert kinds == {
        None: "WeightedSum",
        "sum": "WeightedSum",
        "pcgrad": "PCGrad",
        "often": "WeightedSum",
        "famous": "FAMO",
    }
    assert {n.method: n.cfg.solver.lr for n in networks if n.method} == {
        "sum": 0.02,
        "pcgrad": 0.02,
        "often": 0.5,
        "famous": 0.25,
    }


def test_two_tasks_of_which_one_needs_the_other_are_two_networks() -> None:
    networks = plan(tasks="detection,mask")
    assert [(n.own_of, n.method) for n in networks] == [("detection", None), ("mask", "sum")]
    networks = plan("methods=[pcgrad]", tasks="detection,mask")
    assert [(n.own_of, n.method) for n in networks] == [("detection", None), ("mask", None), (None, "pcgrad")]


def test_cells_are_seed_by_seed() -> None:
    cells = plan_cells(plan("seed=5"), 2, Path("out"))
    assert [cell.seed for cell in cells] == [5] * 4 + [6] * 4
    assert len({cell.name for cell in cells}) == 8
    assert cells[-1].cfg.seed == 6
    assert cells[-1].cfg.output_dir == "out/runs/all-sum_seed6"


def test_what_is_said_of_an_absent_task_goes_with_it() -> None:
    need_tasks("detection", "mask", "depth")
    sets = [
        "{name: boxes, images: x, annotations: y, tasks: [detection, mask]}",
        "{name: metres, images: x, annotations: y, tasks: [depth]}",
    ]
    cfg = compose(
        "train",
        [
            *("tasks=[detection,mask,depth]", "data.root=x", f"data.train=[{','.join(sets)}]"),
            *("data.mixing.method=ratios", "+data.mixing.ratios={boxes: 1, metres: 2}"),
            "+balancing.weights={mask: 2.0, detection/rpn_loc: 0.5, depth: 3.0}",
            *("+solver.lr_factors={depth: 0.5, trunk: 0.1}", "solver.best_metric=val/depth/rmse"),
            *("+solver.task_schedule.depth.start=100", "solver.freeze=[depth, backbone.stem.*, image_tasks.depth.*]"),
        ],
    )
    kept = without_tasks(cfg, ["depth"])
    assert set(kept.tasks) == {"detection", "mask"}
    assert dict(kept.balancing.weights) == {"mask": 2.0, "detection/rpn_loc": 0.5}
    assert dict(kept.solver.lr_factors) == {"trunk": 0.1}
    assert kept.solver.best_metric is None
    assert kept.solver.task_schedule == {}
    assert list(kept.solver.freeze) == ["backbone.stem.*"]
    assert [s.name for s in kept.data.train] == ["boxes"]
    assert dict(kept.data.mixing.ratios) == {"boxes": 1}
    assert set(cfg.tasks) == {"detection", "mask", "depth"}


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["subsets=[[mask]]"], "subsets: .mask.: .*add a detector"),
        (["subsets=[[msk]]"], "subsets: no task 'msk'"),
        (["balancing=pcgrad"], "methods="),
        (["methods=[pcgard]"], "pcgard"),
        (["methods=[]"], "methods=..: expected at least one"),
        (['+variants.sum=["solver.lr=1"]'], "variants.sum"),
        (['+variants.x=["solver.lrr=1"]'], "solver.lrr"),
        (['+variants.x=["~tasks.mask"]'], "variants.x: a variant cannot change the tasks"),
        (["seeds=0"], "seeds=0: expected a whole number of at least 1"),
    ],
)
def test_faults(overrides: list[str], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        plan(*overrides)


def test_one_network_is_no_comparison() -> None:
    with pytest.raises(ConfigError, match="nothing to compare"):
        plan(tasks="detection")
