"""Micro-batches train as one batch, on one rank and on two, whatever is labelled where; gradients are communicated
once per step."""

from __future__ import annotations

import copy
import json
import math
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from accumulate_worker import batches_of, make_trainer, network
from ddp_worker import PATTERNS
from ranks import ROOT, fork_ranks, run_ranks
from tiny import LABEL_SPACE, make_sample, need_tasks, tiny_config, tiny_model
from torch import Tensor, nn

from mtl_rcnn.balancing import Scalarizer
from mtl_rcnn.data.planner import check_world
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.trainer import split, unchanged_buffers
from mtl_rcnn.errors import ConfigError, TrainingError

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Of (ranks, micro-batches per rank): 1 x 1, 1 x 4, 2 x 1, 2 x 2."""
    need_tasks("detection", "mask", "keypoint")
    folder = tmp_path_factory.mktemp("accumulate")
    for world, accumulate in ((1, 1), (1, 4), (2, 1), (2, 2)):
        command = [str(ROOT / "tests" / "accumulate_worker.py"), str(folder), str(accumulate)]
        for status, output in run_ranks(command, world):
            assert status == 0, output
    return {path.stem: torch.load(path) for path in folder.iterdir()}


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("run", ["world1_rank0_accumulate4", "world2_rank0_accumulate2"])
def test_micro_batches_train_as_one_batch(run: str, pattern: str, results: dict[str, dict[str, Any]]) -> None:
    whole, cut = results["world1_rank0_accumulate1"][pattern], results[run][pattern]
    logged = {name: value for name, value in whole["values"].items() if name in cut["values"]}
    assert cut["values"] == pytest.approx(logged, rel=1e-6, abs=1e-9)
    moved = 0.0
    start = network().state_dict()
    for name, tensor in whole["model"].items():
        assert (cut["model"][name] - tensor).abs().max() <= 1e-6, name
        moved = max(moved, float((tensor - start[name]).abs().max()))
    assert moved > 1e-4 or pattern == "no labels anywhere"


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients_are_communicated_once_per_step(pattern: str, results: dict[str, dict[str, Any]]) -> None:
    once, cut = (results[f"world2_rank0_accumulate{number}"][pattern]["buckets"] for number in (1, 2))
    assert len(once) >= 2  # two steps
    assert len(cut) == len(once)


WIDE = "model.backbone.width=32"
"""Of a trunk that fills more than one of DDP's buckets."""


def test_collectives_of_a_step_depend_neither_on_micro_batches_nor_on_the_number_of_tasks(tmp_path: Path) -> None:
    """As the profiler sees them: two broadcasts of the buffers (of floats and of integers), one reduction of all
    losses, and one of each of DDP's buckets, which hold every gradient once."""
    need_tasks("detection", "mask", "keypoint")
    tasks, path = ["detection", "mask", "keypoint"], tmp_path / "found.json"

    def rank() -> None:
        with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
            found = [_collectives(tasks, number, ranks) for number in (1, 2, 4)]
            found.append(_collectives(tasks[:1], 1, ranks))
            if ranks.is_main:
                path.write_text(json.dumps(found))

    assert fork_ranks(rank, 2) == [0, 0]
    whole, in_two, in_four, one_task = json.loads(path.read_text())
    model = tiny_model(tasks, WIDE)
    names, sizes = zip(*whole)
    assert names == ("broadcast", "broadcast", *["all_reduce"] * len(names[2:]))
    assert sum(sizes[:2]) == sum(buffer.numel() for buffer in model.buffers())
    assert sizes[2] == 2 * len(model.loss_names()) + len(tasks) + 2 + 1  # sums, counts, images, faults of ranks, stop
    assert len(sizes[3:]) >= 2
    assert sum(sizes[3:]) == sum(parameter.numel() for parameter in model.parameters())
    assert in_two == in_four == whole
    assert [name for name, _ in one_task] == list(names)


def _collectives(tasks: list[str], accumulate: int, ranks: Ranks) -> list[tuple[str, int]]:
    """Kind and number of elements of every collective of one step in order, on rank 0. Of the third step: DDP arranges
    its buckets anew after the first."""
    labelled = dict.fromkeys(tasks, True)
    samples = [make_sample(4 * ranks.rank + index, (64, 96), 1, labelled=labelled) for index in range(4)]
    trainer = make_trainer(tiny_model(tasks, WIDE), [samples] * 3, ranks, accumulate)
    trainer.run_step()
    trainer.run_step()
    with torch.profiler.profile(record_shapes=True) as profile:
        trainer.run_step()
    if not ranks.is_main:  # going through the events takes longer than the steps
        return []
    events = [event for event in profile.events() if event.name.startswith("gloo:")]
    return [(event.name.removeprefix("gloo:"), math.prod(event.input_shapes[0])) for event in events]


def test_validation_losses_do_not_depend_on_the_ranks(results: dict[str, dict[str, Any]]) -> None:
    one, *two = (
        results[f"{name}_accumulate1"]["validation"] for name in ("world1_rank0", "world2_rank0", "world2_rank1")
    )
    assert len(one) >= 6
    assert all(values == pytest.approx(one, rel=1e-9) for values in two)


class _Squares(Scalarizer):
    """Not linear in the losses: sum_i L_i^2."""

    def scalar(self, losses: Mapping[str, Tensor]) -> Tensor:
        return torch.stack(list(losses.values())).square().sum()


def test_a_balancer_that_is_not_linear_sees_the_whole_batch() -> None:
    need_tasks("detection", "mask", "keypoint")
    found = []
    for accumulate in (1, 4):
        model = network()
        balancer = _Squares(model.loss_names())
        make_trainer(model, batches_of("masks on one rank only", ALONE), ALONE, accumulate, balancer).run_step()
        found.append([*map(torch.tensor, balancer.weights().values()), *(p.grad for p in model.parameters())])
    assert found[0][0].abs().min() > 0
    for whole, cut in zip(*found):
        torch.testing.assert_close(cut, whole, rtol=1e-6, atol=1e-9)


def test_a_micro_batch_that_is_not_finite_is_named_before_any_update(tmp_path: Path) -> None:
    model = tiny_model(["detection"])
    samples = [make_sample(seed, (64, 96), 2, labelled={"detection": True}) for seed in range(4)]
    samples[2]["image"] = torch.full((3, 64, 96), torch.nan)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = make_trainer(model, [samples], ALONE, 4)
    trainer.failure = (tmp_path, *trainer.failure[1:])
    with pytest.raises(TrainingError, match=r"images: random/2;"):
        trainer.run_step()
    assert all(p.grad is None for p in model.parameters())
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name]), name


def test_the_counting_pass_leaves_no_trace_in_batch_norm() -> None:
    norm = nn.BatchNorm2d(3)
    before = {name: buffer.clone() for name, buffer in norm.named_buffers()}
    with torch.no_grad(), unchanged_buffers(norm):
        norm(torch.randn(2, 3, 4, 4))
        assert not torch.equal(norm.running_mean, before["running_mean"])
    for name, buffer in norm.named_buffers():
        assert torch.equal(buffer, before[name])


def test_batch_norm_counts_each_micro_batch_once() -> None:
    model = tiny_model(["detection"])
    samples = [make_sample(seed, (64, 96), 2, labelled={"detection": True}) for seed in range(4)]
    expected = copy.deepcopy(model).train()
    for first in (0, 2):
        expected(samples[first : first + 2])
    make_trainer(model, [samples], ALONE, 2).run_step()
    statistics = dict(model.named_buffers())
    assert int(statistics["backbone.bottom_up.stem.conv1.norm.num_batches_tracked"]) == 2
    for name, buffer in expected.named_buffers():
        assert torch.equal(statistics[name], buffer), name


class _Saved:
    """Bytes that autograd keeps for the backward pass: now, and at most."""

    def __init__(self) -> None:
        self.now = self.peak = 0

    def pack(self, tensor: Tensor) -> Any:
        # Detached: a graph that is left before its backward pass would else hold itself.
        kept, size = _Kept(tensor.detach()), tensor.numel() * tensor.element_size()
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(kept, self.release, size)
        return kept

    def release(self, size: int) -> None:
        self.now -= size


class _Kept:
    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize(
    "options", [["balancing=sum"], ["balancing=mgda"], ["balancing=mgda", "balancing.at=parameters"]]
)
def test_one_graph_at_a_time_is_in_memory(options: list[str]) -> None:
    need_tasks("mask")
    samples = [make_sample(seed, (96, 128), 2) for seed in range(4)]
    cfg = tiny_config(["detection", "mask"], *options)
    peaks = []
    for accumulate in (1, 4):
        saved = _Saved()
        model = build_model(cfg, LABEL_SPACE)
        balancer = build_balancer(cfg, model, None)
        share_gradients(balancer, model, ALONE, cfg.solver)
        trainer = make_trainer(model, [samples], ALONE, accumulate, balancer)
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, lambda kept: kept.tensor):
            trainer.run_step()
        assert saved.now == 0
        peaks.append(saved.peak)
    assert peaks[1] < 0.4 * peaks[0]


def test_batches_are_cut_in_order_and_evenly() -> None:
    assert split(["a", "b", "c", "d"], 2) == [["a", "b"], ["c", "d"]]
    check_world(8, 2, 4)
    with pytest.raises(ConfigError, match=r"solver.batch_size=8 .*2 ranks with solver.accumulate=3.*multiple of 6"):
        check_world(8, 2, 3)
