"""One rank of tests/balancing/test_rcnn.py: a box + mask + keypoint network on three data sets, each of which labels
something else, through the loader, with several methods; writes what came and what the methods made of it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accumulate_worker import make_trainer
from mixed_data import SIZE, specs
from omegaconf import open_dict
from tiny import tiny_config
from toy import Toy, write_toy

from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.data import train_datasets, train_loader
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together

TASKS = ("detection", "mask", "keypoint")
KINDS = ("boxes", "masks", "points")
STEPS = 4
METHODS = {
    "uncertainty": ["balancing=uncertainty"],
    "dwa": ["balancing=dwa", "balancing.period=1"],
    "famo": ["balancing=famo", "balancing.every=1"],
    "pcgrad": ["balancing=pcgrad"],
    "upgrad": ["balancing=upgrad"],
    "upgrad at parameters": ["balancing=upgrad", "balancing.at=parameters"],
    "gradnorm": ["balancing=gradnorm", "balancing.start=1"],
}
NETWORK = [
    *("model.backbone.norm=GN", "model.backbone.width=32", "solver.batch_size=4", "data.window=2", "data.workers=0"),
    # Of one size, lest its company change how an image is padded.
    *("data.train_augment.resize=null", "+data.train_augment.fixed._target_=detectron2.data.transforms.Resize"),
    f"+data.train_augment.fixed.shape=[{SIZE[0]},{SIZE[1]}]",
]


def train(method: str, toy: Toy, ranks: Ranks) -> list[dict[str, Any]]:
    """Of every step: image and number of this rank's samples, weights, and the method's state."""
    cfg = tiny_config(TASKS, *NETWORK, *METHODS[method])
    with open_dict(cfg):
        cfg.data.train = specs(toy, KINDS)
    datasets, space = train_datasets(cfg)
    model = build_model(cfg, space).double()
    balancer = build_balancer(cfg, model, None)
    share_gradients(balancer, model, ranks, cfg.solver)
    came: list[list[Sample]] = []

    def kept() -> Iterator[list[Sample]]:
        for batch in train_loader(cfg, datasets, build_targets(cfg, space), 0, ranks):
            came.append(batch)
            yield batch

    trainer = make_trainer(model, kept(), ranks, 1, balancer, draws=cfg.seed)
    steps = []
    for trainer.iter in range(STEPS):
        trainer.run_step()
        state = {name: value for name, value in balancer.state_dict().items() if torch.is_tensor(value)}
        steps.append(
            {
                "samples": [(s["sample_index"], s["dataset"], s["image_id"]) for s in came[-1]],
                "scalars": {name: trainer.scalars[name] for name in (*model.loss_names(), *balancer.scalars())},
                "state": {name: value.clone() for name, value in state.items()},
            }
        )
    return steps


def main(folder: str) -> None:
    """Trains with every method and writes the results."""
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        toy = write_toy(Path(folder) / f"toy_{ranks.world}_{ranks.rank}")
        results = {method: train(method, toy, ranks) for method in METHODS}
        torch.save(results, Path(folder) / f"world{ranks.world}_rank{ranks.rank}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
