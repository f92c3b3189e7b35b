"""A trained network back from its checkpoint, which holds its configuration and classes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from omegaconf import DictConfig, OmegaConf

from mtl_rcnn.data.label_space import LabelSpace
from mtl_rcnn.engine import checkpoint as checkpoints
from mtl_rcnn.engine import model_file
from mtl_rcnn.engine.build import build_model
from mtl_rcnn.engine.checkpoint import Checkpointer
from mtl_rcnn.engine.weights import load_weights
from mtl_rcnn.errors import CheckpointError
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


@dataclass(frozen=True)
class Restored:
    """A trained network.

    Attributes:
        path: the checkpoint, or the file of its weights alone.
        cfg: the configuration it was trained with.
        label_space: its classes.
        model: in evaluation mode; the average of its weights if the run kept one (`solver.ema`).
        iteration: steps it was trained for.
        versions: that wrote the checkpoint.
    """

    path: Path
    cfg: DictConfig
    label_space: LabelSpace
    model: MultiTaskRCNN
    iteration: int
    versions: dict[str, str]


def restore(source: str | Path, device: torch.device | str = "cpu", which: str = "last") -> Restored:
    """Rebuilds the network of a checkpoint file, of a file of its weights alone, or of a run's directory.

    Args:
        source: a `.pth` file, a `.safetensors` file that this project exported, or the directory of a run.
        device: where the network goes.
        which: "last" or "best" checkpoint of a directory.

    Raises:
        CheckpointError: no such checkpoint, or one that cannot be read.
    """
    path = _choose(Path(source), which)
    state = model_file.load(path) if path.suffix == model_file.SUFFIX else checkpoints.load(path)
    cfg = OmegaConf.create(state["config"])
    label_space = LabelSpace.from_state(state["label_space"])
    model = build_model(cfg, label_space)
    load_weights(model, checkpoints.trained_weights(state), str(path))
    return Restored(path, cfg, label_space, model.to(device).eval(), state["iteration"], state["versions"])


def _choose(source: Path, which: str) -> Path:
    if not source.is_dir():
        return source
    if which == "best":
        return source / "model_best.pth"
    latest = Checkpointer(source, keep=1).latest()
    if latest is None:
        raise CheckpointError(
            f"{source}: no checkpoint in this directory; name a run's output_dir, a .pth or a .safetensors file"
        )
    return latest
