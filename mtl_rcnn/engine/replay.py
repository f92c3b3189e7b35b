"""What a step that failed leaves behind, and how to see it again: `python -m mtl_rcnn.engine.replay FILE`."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.data.target import Sample
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.freeze import freeze
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def save_replay(
    path: Path,
    model: nn.Module,
    samples: Sequence[Sample],
    iteration: int,
    config: dict[str, Any],
    label_space: LabelSpace,
) -> None:
    """Writes everything the step was a function of: weights before it, the batch as loaded, configuration, classes.

    The file pickles the batch: open only replay files of your own runs.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(
        {
            "iteration": iteration,
            "model": model.state_dict(),
            "samples": list(samples),
            "config": config,
            "label_space": label_space.state(),
        },
        path,
    )


def part_of(error: BaseException, model: MultiTaskRCNN) -> str | None:
    """The task, or the trunk, in whose code an error arose: the innermost one of its traceback. None if there is none,
    as in most of the backward pass."""
    owners = {id(module): name for name, part in model.parts().items() for module in part.modules()}
    seen = [id(frame.f_locals.get("self")) for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((owners[number] for number in reversed(seen) if number in owners), None)


def replay(path: Path) -> tuple[MultiTaskRCNN, list[Sample]]:
    """The network as it was before the step, in training mode on the CPU, and the step's batch."""
    state = torch.load(path, map_location="cpu", weights_only=False)
    cfg = OmegaConf.create(state["config"])
    model = build_model(cfg, LabelSpace.from_state(state["label_space"]))
    freeze(model, OmegaConf.select(cfg, "solver.freeze", default=()))
    model.load_state_dict(state["model"])
    return model.train(), state["samples"]


def first_nonfinite_module(model: nn.Module, samples: Sequence[Sample]) -> str | None:
    """Name of the first module, in the order of the forward pass, whose output is not finite."""
    found: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, torch.Tensor) and output.is_floating_point() and not torch.isfinite(output).all():
                found.append(name)

        return hook

    handles = [module.register_forward_hook(watch(name)) for name, module in model.named_modules() if name]
    try:
        model(samples)
    except FloatingPointError:
        found.append("proposals")
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else None


def main() -> None:
    """Runs the batch again and prints every loss part, and where the first value that is not finite arises."""
    if len(sys.argv) != 2:
        sys.exit("usage: python -m mtl_rcnn.engine.replay FILE")
    model, samples = replay(Path(sys.argv[1]))
    print("images:", ", ".join(f"{sample['image_id']} ({sample['file_name']})" for sample in samples))
    print("first module whose output is not finite:", first_nonfinite_module(model, samples))
    try:
        losses, _ = model(samples)
    except FloatingPointError as error:
        sys.exit(f"the step fails again: {error}")
    for name, (value, count) in losses.items():
        print(f"{name}: {float(value) / max(float(count), 1.0):.6g}")


if __name__ == "__main__":
    main()
