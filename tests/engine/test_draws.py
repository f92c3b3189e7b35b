"""What layers draw, such as dropout, is a function of the seed and the batch (docs/adr/0012)."""

from __future__ import annotations

import pytest
import torch
from accumulate_worker import make_trainer
from tiny import make_sample, need_tasks, tiny_model
from torch import Tensor

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.distributed import Ranks


def batch(first: int) -> list[Sample]:
    """Two images with labels; sample indices from `first`."""
    label = torch.tensor([1, 0, 0, 1])
    given = [make_sample(first + index, (64, 64), 0, {"image_label": True}) for index in range(2)]
    return [{**sample, "targets": {"image_label": label}} for sample in given]


def trained(draws: int | None, drawn_before: int = 0, accumulate: int = 1) -> Tensor:
    """The head's weights after two steps."""
    model = tiny_model(["image_label"], "tasks.image_label.dropout=0.5")
    batches = [batch(0), batch(2)]
    trainer = make_trainer(model, batches, Ranks(0, 1, 0, torch.device("cpu")), accumulate, draws=draws)
    torch.manual_seed(5)
    torch.rand(drawn_before)
    for trainer.iter in range(2):
        trainer.run_step()
    return model.image_tasks["image_label"].head[-1].weight.detach().clone()


@pytest.mark.parametrize("accumulate", [1, 2])
def test_what_was_drawn_before_does_not_matter(accumulate: int) -> None:
    need_tasks("image_label")
    first = trained(3, accumulate=accumulate)
    assert torch.equal(first, trained(3, drawn_before=7, accumulate=accumulate))
    assert not torch.equal(first, trained(4, accumulate=accumulate))
    assert not torch.equal(trained(None, accumulate=accumulate), trained(None, 7, accumulate))
