"""One rank of tests/balancing/test_on_ranks.py: five steps of the trainer with each method on batches of four images,
each labelled for one task; writes the weights of the network, of the method and of the tasks."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from accumulate_worker import make_trainer
from detectron2.data import transforms as T
from mixed_data import SIZE, specs
from tiny import tiny_config
from toy import Toy, write_toy

from mtl_rcnn.data.catalog import build_datasets
from mtl_rcnn.data.dataset_spec import DatasetSpec
from mtl_rcnn.data.mapper import Mapper
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.balance import build_balancer, share_gradients
from mtl_rcnn.engine.build import build_model, build_targets
from mtl_rcnn.engine.distributed import Ranks, distributed
from mtl_rcnn.engine.failures import fail_together
from mtl_rcnn.engine.trainer import PRECISIONS

TASKS = ("image_label", "semantic", "depth")
KINDS = ("words", "classes", "distances")
SMALL = ["model.backbone.norm=GN", "model.backbone.width=32"]
SMALL += [f"tasks.{task}.decoder.conv_dim=32" for task in ("semantic", "depth")]
ON_GRADIENTS = ("pcgrad", "mgda", "imtl_g", "aligned_mtl", "upgrad", "cagrad", "nash_mtl", "gradnorm")
AT_PARAMETERS = tuple(f"{name} at parameters" for name in ("pcgrad", "upgrad", "gradnorm"))
BALANCING = {
    "sum": ["balancing=sum", "+balancing.weights={depth: 0.5}"],
    "uncertainty": ["balancing=uncertainty", "balancing.regression=[depth]"],
    "dwa": ["balancing=dwa", "balancing.period=1"],
    "rlw": ["balancing=rlw"],
    "imtl_l": ["balancing=imtl_l"],
    "geometric_mean": ["balancing=geometric_mean"],
    "famo": ["balancing=famo", "balancing.every=2"],
    **{name: [f"balancing={name}"] for name in ON_GRADIENTS},
    "gradnorm": ["balancing=gradnorm", "balancing.start=1"],
    **{name: [f"balancing={name.split()[0]}", "balancing.at=parameters"] for name in AT_PARAMETERS},
    "gradnorm at parameters": ["balancing=gradnorm", "balancing.start=1", "balancing.at=parameters"],
}
STEPS = 5
ORDERS = [  # kinds of a step's four images; on two ranks a task is labelled on both, on either one, or on none
    ("words", "classes", "distances", "words"),
    ("classes", "distances", "words", "words"),
    ("distances", "distances", "classes", "classes"),
    ("words", "words", "words", "classes"),
    ("classes", "words", "distances", "classes"),
]


class Bench:
    """Networks of three tasks on whole images, and images that are labelled for one of them each."""

    def __init__(self, toy: Toy) -> None:
        self.datasets, self.space = build_datasets([DatasetSpec.from_config(node) for node in specs(toy, KINDS)], {})
        mapper = Mapper(build_targets(tiny_config(TASKS, *SMALL), self.space), [T.Resize(SIZE)])
        numbers = iter(range(1000))
        self.samples = {data.name: [mapper(record, next(numbers)) for record in data.records] for data in self.datasets}

    def batch(self, step: int) -> list[Sample]:
        """The four images of a step."""
        return [self.samples[kind][(step + place) % 6] for place, kind in enumerate(ORDERS[step % len(ORDERS)])]

    def train(
        self,
        method: str,
        ranks: Ranks,
        accumulate: int = 1,
        dtype: torch.dtype = torch.float64,
        precision: str = "float32",
        tasks: tuple[str, ...] = TASKS,
    ) -> dict[str, Any]:
        """Five steps on this rank's share of each batch; weights are of type `dtype`."""
        small = [knob for knob in SMALL if not knob.startswith("tasks.") or knob.split(".")[1] in tasks]
        cfg = tiny_config(tasks, *small, *BALANCING[method], f"solver.precision={precision}")
        model = build_model(cfg, self.space).to(dtype)
        share = 4 // ranks.world
        batches = [self.batch(step)[ranks.rank * share :][:share] for step in range(STEPS)]
        balancer = build_balancer(cfg, model, None)
        share_gradients(balancer, model, ranks, cfg.solver)
        trainer = make_trainer(model, batches, ranks, accumulate, balancer, precision=PRECISIONS[precision])
        weights = []
        for trainer.iter in range(STEPS):
            trainer.run_step()
            weights.append({**balancer.weights(), **balancer.scalars()})
        return {"model": model.state_dict(), "balancer": balancer.state_dict(), "weights": weights}


def main(folder: str, accumulate: str) -> None:
    """Trains with every method and writes the results."""
    with distributed("cpu", timeout_s=100) as ranks, fail_together(ranks):
        bench = Bench(write_toy(Path(folder) / f"toy_{ranks.world}_{accumulate}_{ranks.rank}"))
        cut_alone = ranks.world == 1 and accumulate != "1"  # methods on losses: tests/engine/test_accumulate.py
        methods = (*ON_GRADIENTS, *AT_PARAMETERS) if cut_alone else BALANCING
        results = {method: bench.train(method, ranks, int(accumulate)) for method in methods}
        torch.save(results, Path(folder) / f"world{ranks.world}_rank{ranks.rank}_accumulate{accumulate}.pt")


if __name__ == "__main__":
    main(*sys.argv[1:])
