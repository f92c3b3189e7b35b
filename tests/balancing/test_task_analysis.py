"""The analysis of a training step against autograd itself; on two ranks; and training goes on as if nobody looked."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from analysis_worker import METHODS, STEPS, train
from balance_worker import KINDS, ORDERS, SMALL, TASKS, Bench
from ranks import ROOT, run_ranks
from test_train import TASKS as ALL_TASKS
from test_train import toy_config
from tiny import make_sample, need_tasks, tiny_config, tiny_model
from toy import Toy

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.losses import reduce_losses
from mtl_rcnn.engine.progress import read_metrics
from mtl_rcnn.engine.task_analysis import TaskAnalysis, check_analysis, observed
from mtl_rcnn.engine.train import train as whole_run
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
REGIONS = ("detection", "mask", "keypoint")


def network(kind: str, toy: Toy) -> tuple[MultiTaskRCNN, list[Sample]]:
    """Of tasks on images, each of which is labelled for one task; or of tasks on boxes. With a batch."""
    if kind == "regions":
        return tiny_model(REGIONS).double().train(), [make_sample(number, (64, 96), 4) for number in (1, 2)]
    bench = Bench(toy)
    return build_model(tiny_config(TASKS, *SMALL), bench.space).double().train(), bench.batch(0)


def look(model: MultiTaskRCNN, samples: list[Sample], weights: dict[str, float]) -> TaskAnalysis:
    with observed(model) as observation:
        sums, _ = model(samples)
    return observation.analyse(sums, reduce_losses(sums, samples, ALONE), weights, ALONE)


@pytest.mark.parametrize("kind", ["images", "regions"])
def test_norms_and_cosines_are_those_of_separate_backward_passes(kind: str, toy: Toy) -> None:
    need_tasks(*TASKS, *REGIONS)
    model, samples = network(kind, toy)
    weights = {name: 0.5 + 0.1 * place for place, name in enumerate(model.loss_names())}
    kept: list[dict[str, torch.Tensor]] = []
    with model.backbone.register_forward_hook(lambda module, given, found: kept.append(found)):
        losses = reduce_losses(model(samples)[0], samples, ALONE).losses
    own = {}
    for task in (task.name for task in model.tasks()):
        total = sum(loss * weights[name] for name, loss in losses.items() if name.startswith(f"{task}/"))
        found = torch.autograd.grad(total, list(kept[0].values()), retain_graph=True, materialize_grads=True)
        own[task] = np.concatenate([gradient.numpy().ravel() for gradient in found])

    analysis = look(model, samples, weights)
    assert analysis.finite
    assert analysis.norms == pytest.approx({task: np.linalg.norm(g) for task, g in own.items()}, rel=1e-9)
    lengths = {task: np.linalg.norm(gradient) for task, gradient in own.items()}
    expected = {(a, b): own[a] @ own[b] / (lengths[a] * lengths[b]) for a, b in combinations(own, 2)}
    assert analysis.cosines == pytest.approx(expected, abs=1e-9)
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("kind", ["images", "regions"])
def test_what_the_parts_keep_is_what_the_whole_pass_keeps(kind: str, toy: Toy) -> None:
    need_tasks(*TASKS, *REGIONS)
    model, samples = network(kind, toy)
    saved: list[torch.Tensor] = []
    features = model.backbone.register_forward_hook(lambda module, given, found: saved.extend(found.values()))
    with features, torch.autograd.graph.saved_tensors_hooks(lambda tensor: saved.append(tensor) or tensor, lambda t: t):
        sums, _ = model(samples)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in saved}
    for weight in (*model.parameters(), *model.buffers()):
        storages.pop(weight.untyped_storage().data_ptr(), None)

    first, second = (look(model, samples, dict.fromkeys(sums, 1.0)) for _ in range(2))
    assert sum(first.saved_mib.values()) == pytest.approx(sum(storages.values()) / 2**20)
    assert all(value > 0 for value in first.saved_mib.values())
    assert first.saved_mib == second.saved_mib
    parts = set(model.parts())
    assert set(first.saved_mib) == set(first.forward_ms) == parts
    assert set(first.backward_ms) == parts - {"trunk"}


def test_the_network_is_left_as_it_was(toy: Toy) -> None:
    need_tasks(*TASKS)
    model, samples = network("images", toy)
    methods = {task.name: task.losses for task in model.tasks()}
    with pytest.raises(KeyError), observed(model):
        model([{}])
    assert model.split is None
    assert {task.name: task.losses for task in model.tasks()} == methods
    assert not any("losses" in vars(task) for task in model.tasks())
    assert model(samples)[0]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of one rank, and of each of two."""
    need_tasks(*TASKS)
    folder = tmp_path_factory.mktemp("analysis")
    for world in (1, 2):
        for status, output in run_ranks([str(ROOT / "tests" / "balancing" / "analysis_worker.py"), str(folder)], world):
            assert status == 0, output
    return {path.stem: torch.load(path, weights_only=False) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("method", METHODS)
def test_two_ranks_see_what_one_sees(method: str, results: dict[str, dict[str, Any]]) -> None:
    runs = [results[name][method]["analysed"] for name in ("world1_rank0", "world2_rank0", "world2_rank1")]
    for whole, first, second in zip(*(run["seen"] for run in runs)):
        assert (first.norms, first.cosines) == (second.norms, second.cosines)
        assert first.norms == pytest.approx(whole.norms, rel=1e-8)
        assert first.cosines == pytest.approx(whole.cosines, abs=1e-8)


@pytest.mark.parametrize("method", METHODS)
def test_ranks_train_the_same_bit_for_bit_whether_looked_at_or_not(
    method: str, results: dict[str, dict[str, Any]]
) -> None:
    for rank in (0, 1):
        runs = results[f"world2_rank{rank}"][method]
        assert all(torch.equal(tensor, runs["plain"]["model"][k]) for k, tensor in runs["analysed"]["model"].items())


@pytest.mark.parametrize(
    ("method", "precision", "accumulate"),
    [
        ("sum", "float32", 2),
        ("sum", "float16", 1),
        ("famo", "bfloat16", 1),
        ("pcgrad", "float32", 1),
        ("pcgrad", "float32", 2),
    ],
)
def test_a_network_trains_the_same_bit_for_bit_whether_looked_at_or_not(
    method: str, precision: str, accumulate: int, toy: Toy
) -> None:
    need_tasks(*TASKS)
    bench = Bench(toy)
    plain, analysed = (train(bench, method, ALONE, every, precision, accumulate, torch.float32) for every in (0, 2))
    assert all(torch.equal(tensor, analysed["model"][name]) for name, tensor in plain["model"].items())
    assert [step is not None for step in analysed["seen"]] == [False, True, False]
    assert all(step is None for step in plain["seen"])
    assert analysed["split"] == plain["split"] == (method == "pcgrad")


def test_tasks_without_labels_are_left_out(toy: Toy) -> None:
    need_tasks(*TASKS)
    task_of = dict(zip(KINDS, TASKS))
    for order, analysis in zip(ORDERS, train(Bench(toy), "sum", ALONE, every=1)["seen"]):
        present = [task for kind, task in task_of.items() if kind in order]
        assert set(analysis.norms) <= set(present)
        assert set(analysis.cosines) == {pair for pair in analysis.cosines if set(pair) <= set(analysis.norms)}
        assert len(analysis.cosines) == len(list(combinations(analysis.norms, 2)))


def test_the_loss_scale_is_divided_out_and_steps_that_overflow_are_left_out(toy: Toy) -> None:
    need_tasks(*TASKS)
    bench = Bench(toy)
    single, half = (
        train(bench, "sum", ALONE, every=1, precision=precision, dtype=torch.float32, lr=1e-12)["seen"]
        for precision in ("float32", "float16")
    )
    overflown = [analysis for analysis in half if not analysis.finite]
    assert 1 <= len(overflown) < STEPS  # the first loss scale is too large for this network
    assert all(not analysis.norms and not analysis.cosines for analysis in overflown)
    for one, other in zip(single, half):
        if other.finite:
            assert other.norms == pytest.approx(one.norms, rel=0.05)
            assert other.cosines == pytest.approx(one.cosines, abs=0.05)


def test_a_run_logs_what_it_sees_trains_as_ever_and_resumes_exactly(toy: Toy, tmp_path: Path) -> None:
    options = ["data.val=[]", "solver.log_period=3", "solver.steps=[]", "solver.warmup_iters=0"]
    folders = [tmp_path / name for name in ("whole", "halves", "plain")]
    for folder, every, last in zip([*folders, folders[1]], (2, 2, 0, 2), (5, 3, 5, 5)):
        whole_run(toy_config(toy, folder, *options, f"analysis.every={every}", f"solver.max_iter={last}"))
    whole, halves, plain = (checkpoints.load(folder / "model_0000005.pth")["model"] for folder in folders)
    assert all(torch.equal(tensor, halves[name]) for name, tensor in whole.items())
    assert all(torch.equal(tensor, plain[name]) for name, tensor in whole.items())
    first, second = (
        [row for row in read_metrics(folder / "metrics.jsonl") if any(name.startswith("analysis/") for name in row)]
        for folder in folders[:2]
    )
    assert [row["iteration"] for row in first] == [2, 4]
    assert second == first
    timed = [row for row in read_metrics(folders[0] / "metrics.jsonl", timings=True) if "analysis/mib/trunk" in row]
    for row, again in zip(timed, first):
        assert {f"time/analysis/forward_ms/{part}" for part in ("trunk", *ALL_TASKS)} <= set(row)
        assert {f"time/analysis/backward_ms/{task}" for task in ALL_TASKS} <= set(row)
        assert {f"analysis/mib/{task}" for task in ALL_TASKS} <= set(again)
        normed = [name for name in again if name.startswith("analysis/grad_norm/")]
        cosines = [name for name in again if name.startswith("analysis/cosine/")]
        assert len(cosines) == len(normed) * (len(normed) - 1) / 2 > 0
        assert all(-1 <= again[name] <= 1 for name in cosines)
    assert not any("/" not in name for name in timed[0] if name != "iteration")


def test_a_frozen_trunk_has_no_gradients_to_look_at(toy: Toy) -> None:
    need_tasks(*TASKS)
    model, samples = network("images", toy)
    check_analysis(5, model)
    model.backbone.requires_grad_(False)
    analysis = look(model, samples, dict.fromkeys(model.loss_names(), 1.0))
    assert (analysis.norms, analysis.cosines, analysis.finite) == ({}, {}, True)
    assert set(analysis.forward_ms) == set(model.parts())
    check_analysis(0, model)
    with pytest.raises(ConfigError, match=r"analysis\.every=5: the whole trunk is frozen"):
        check_analysis(5, model)
