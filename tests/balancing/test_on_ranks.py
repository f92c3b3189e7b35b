"""Balanced training on two ranks, and in micro-batches, is balanced training of the whole batch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from balance_worker import AT_PARAMETERS, BALANCING, ON_GRADIENTS, SMALL, TASKS, Bench
from ranks import ROOT, run_ranks
from tiny import need_tasks, tiny_config
from toy import Toy

from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.losses import reduce_losses
from mtl_rcnn.errors import ConfigError

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of (ranks, micro-batches per rank): 1 x 1, 1 x 2, 2 x 1, 2 x 2."""
    need_tasks(*TASKS)
    folder = tmp_path_factory.mktemp("balance")
    for world, accumulate in ((1, 1), (1, 2), (2, 1), (2, 2)):
        command = [str(ROOT / "tests" / "balancing" / "balance_worker.py"), str(folder), str(accumulate)]
        for status, output in run_ranks(command, world):
            assert status == 0, output
    return {path.stem: torch.load(path) for path in Path(folder).glob("*.pt")}


@pytest.mark.parametrize("method", BALANCING)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_two_ranks_train_as_one(method: str, accumulate: int, results: dict[str, dict[str, Any]]) -> None:
    first, second = (results[f"world2_rank{rank}_accumulate{accumulate}"][method] for rank in (0, 1))
    _same(first, results["world1_rank0_accumulate1"][method])
    assert first["weights"] == second["weights"]
    _same(first, second, 0.0)


@pytest.mark.parametrize("method", [*ON_GRADIENTS, *AT_PARAMETERS])
def test_micro_batches_train_as_one_batch(method: str, results: dict[str, dict[str, Any]]) -> None:
    cut, whole = (results[f"world1_rank0_accumulate{number}"][method] for number in (2, 1))
    _same(cut, whole)
    assert all(row == pytest.approx(one, rel=1e-6) for row, one in zip(cut["weights"], whole["weights"]))


def _same(found: dict[str, Any], expected: dict[str, Any], atol: float = 1e-9) -> None:
    """The weights of the network, and the numbers of the method."""
    for part in ("model", "balancer"):
        for name, tensor in expected[part].items():
            if isinstance(tensor, torch.Tensor):
                torch.testing.assert_close(
                    found[part][name], tensor, rtol=0, atol=atol, equal_nan=part == "balancer", msg=name
                )


@pytest.mark.parametrize("method", BALANCING)
def test_methods_train_differently(method: str, results: dict[str, dict[str, Any]]) -> None:
    found, plain = (results["world1_rank0_accumulate1"][name]["weights"] for name in (method, "sum"))
    assert all(row["depth/regression"] == 0.5 and row["semantic/ce"] == 1.0 for row in plain)
    assert method == "sum" or sum(row != one for row, one in zip(found, plain)) >= 3


@pytest.mark.parametrize("method", [method for method in BALANCING if method not in AT_PARAMETERS[1:]])
@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_stays_near_single(method: str, precision: str, toy: Toy) -> None:
    need_tasks(*TASKS)
    bench = Bench(toy)
    expected = bench.train(method, ALONE, dtype=torch.float32)["weights"]
    found = bench.train(method, ALONE, dtype=torch.float32, precision=precision)["weights"]
    if precision == "float16" and method in (
        *ON_GRADIENTS,
        *AT_PARAMETERS,
    ):  # the first loss scale overflows: no weights, and no step
        expected[0] |= {f"weight/{task}": 1.0 for task in TASKS}
    assert found[0] == pytest.approx(expected[0], rel=0.15, abs=0.05)  # later: what rounding did to the network
    assert all(abs(value) < 1e3 for row in found for value in row.values())


@pytest.mark.parametrize("method", [method for method in BALANCING if method not in ("sum", "uncertainty", "rlw")])
def test_a_task_without_any_labels_changes_no_weight(method: str, toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tasks', against a network without it. The sum and uncertainty's knobs name the task; RLW draws."""
    need_tasks(*TASKS)
    bench = Bench(toy)
    kinds = ("words", "classes", "classes", "words")
    monkeypatch.setattr(
        bench, "batch", lambda step: [bench.samples[kind][(step + i) % 6] for i, kind in enumerate(kinds)]
    )
    found, expected = (bench.train(method, ALONE, tasks=tasks)["weights"] for tasks in (TASKS, TASKS[:2]))
    assert all(row["weight/depth"] == 1.0 for row in found)
    for row, without in zip(found, expected):
        assert {name: row[name] for name in without} == pytest.approx(without, rel=1e-6)


@pytest.mark.parametrize("method", [method for method in ON_GRADIENTS if method != "gradnorm"])
def test_heads_learn_from_their_own_loss_and_the_trunk_from_the_weighted_sum(method: str, toy: Toy) -> None:
    """Against torch.autograd.grad, task by task."""
    need_tasks(*TASKS)
    bench = Bench(toy)
    cfg = tiny_config(TASKS, *SMALL, *BALANCING[method])
    model = build_model(cfg, bench.space).double().train()
    trunk, samples = list(model.backbone.parameters()), bench.batch(0)
    losses = reduce_losses(model(samples)[0], samples, ALONE)
    totals = [sum(losses.losses[part] for part in losses.losses if part.split("/")[0] == task) for task in TASKS]
    own = {task: torch.autograd.grad(total, trunk, retain_graph=True) for task, total in zip(TASKS, totals)}
    heads = {name: p for name, p in model.named_parameters() if not name.startswith("backbone.")}
    expected = dict(zip(heads, torch.autograd.grad(sum(totals), list(heads.values()))))

    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ALONE, cfg.solver)
    losses = reduce_losses(model(samples)[0], samples, ALONE)
    balancer(losses.losses, losses.values, losses.valid).backward()
    weights = balancer.scalars()
    if method not in ("pcgrad", "upgrad"):  # which leave gradients that agree alone
        assert len({round(weight, 6) for weight in weights.values()}) > 1
    for name, parameter in heads.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-9, atol=1e-12)
    for index, parameter in enumerate(trunk):
        combined = sum(weights[f"weight/{task}"] * own[task][index] for task in TASKS)
        torch.testing.assert_close(parameter.grad, combined, rtol=1e-7, atol=1e-10)


def test_what_cannot_be_combined_is_told(toy: Toy) -> None:
    need_tasks(*TASKS)
    bench = Bench(toy)
    cfg = tiny_config(TASKS, *SMALL, *BALANCING["upgrad"])
    model = build_model(cfg, bench.space)
    balancer = build_balancer(cfg, model, None)
    model.backbone.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"UPGrad combines .* and the whole trunk is frozen; choose balancing=sum"):
        share_gradients(balancer, model, ALONE, cfg.solver)
