"""bfloat16 and float16 train as float32 does, up to their rounding; a step that overflows changes nothing."""

from __future__ import annotations

import pytest
import torch
from accumulate_worker import make_trainer
from tiny import make_sample, need_tasks, tiny_model

from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.engine.trainer import Trainer

pytestmark = pytest.mark.slow  # not run once more for each task that is left out

ALONE = Ranks(0, 1, 0, torch.device("cpu"))
STEPS = 50


def _trainer(precision: torch.dtype | None) -> Trainer:
    """Six images in turn, one per step, at a rate at which they are learnt."""
    need_tasks("detection", "mask", "keypoint")
    model = tiny_model(("detection", "mask", "keypoint"), "model.backbone.norm=GN", "model.backbone.width=32")
    batches = [[make_sample(step % 6, (64, 96), 2)] for step in range(STEPS)]
    return make_trainer(model, batches, ALONE, 1, precision=precision, lr=0.0005)


def _totals(precision: torch.dtype | None) -> list[float]:
    trainer = _trainer(precision)
    totals = []
    for _ in range(STEPS):
        trainer.run_step()
        totals.append(trainer.scalars["total"])
    return totals


@pytest.mark.slow
def test_fifty_steps_stay_near_float32() -> None:
    exact, *halves = (_totals(precision) for precision in (None, torch.bfloat16, torch.float16))
    start, end = exact[0], sum(exact[-12:]) / 12
    assert end < 0.6 * start
    for totals in halves:
        assert totals != exact
        assert totals[0] == pytest.approx(start, rel=0.005)
        assert sum(totals[-12:]) / 12 == pytest.approx(end, rel=0.1)


def test_a_step_that_overflows_changes_no_weight_and_lowers_the_scale() -> None:
    trainer = _trainer(torch.float16)
    trainer.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)
    before = {name: p.detach().clone() for name, p in trainer.network.named_parameters()}
    trainer.run_step()
    assert all(torch.equal(p, before[name]) for name, p in trainer.network.named_parameters())
    assert trainer.scaler.get_scale() == trainer.scalars["loss_scale"] == 2.0**39
    assert trainer.scalars["grad_norm"] == float("inf") or trainer.scalars["grad_norm"] != trainer.scalars["grad_norm"]


def test_a_scaled_step_is_the_unscaled_one() -> None:
    """In float32 a power of two as scale loses nothing: clipping and the optimizer see the same gradients."""
    plain, scaled = _trainer(None), _trainer(None)
    scaled.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    for trainer in (plain, scaled):
        trainer.clip = 1.0
        trainer.run_step()
    assert scaled.scalars["grad_norm"] == plain.scalars["grad_norm"] > 1
    for ours, theirs in zip(scaled.network.parameters(), plain.network.parameters()):
        assert torch.equal(ours, theirs)
