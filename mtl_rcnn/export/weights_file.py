"""Writes `model.safetensors`: the weights that evaluation uses, with what rebuilds the network around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from mtl_rcnn.engine import model_file
from mtl_rcnn.engine.pretrained.load import named_parts
from mtl_rcnn.engine.restore import Restored
from mtl_rcnn.errors import CheckpointError, ConfigError
from mtl_rcnn.modeling.inference import chosen_tasks

NAME = f"model{model_file.SUFFIX}"


def export_weights(
    restored: Restored, folder: Path, config: Mapping[str, Any], tasks: Collection[str] | None = None
) -> dict[str, Any]:
    """Writes the tensors of a restored network as they are, with its iteration, classes and versions. Returns what the
    file says of them.

    Args:
        restored: the network.
        folder: where the file goes.
        config: the training configuration with the exported tasks alone.
        tasks: names of the tasks to export; the tensors of others are left out. None exports all.

    Raises:
        ConfigError: unknown or incomplete `tasks`, or the network is that of the file that would be written.
        CheckpointError: the file cannot be written.
    """
    path = folder / NAME
    if path.exists() and path.samefile(restored.path):
        raise ConfigError(f"output_dir={folder}: its {NAME} is the network to export; choose another")
    kept = chosen_tasks(restored.model, tasks)
    parts = named_parts(restored.model)
    left_out = {name for task in restored.model.tasks() if task.name not in kept for name in parts[task.name]}
    weights = {name: value for name, value in restored.model.state_dict().items() if name not in left_out}
    told = {
        "iteration": restored.iteration,
        "label_space": restored.label_space.state(),
        "config": dict(config),
        "versions": restored.versions,
    }
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise CheckpointError(f"output_dir={folder}: cannot be made ({error.strerror}); choose another") from error
    model_file.save(path, weights, told)
    return told
