"""Which parameters a name of the configuration stands for."""

from __future__ import annotations

from fnmatch import fnmatchcase

from torch import nn

from mtl_rcnn.config.part_names import is_pattern, unknown_name
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def named_parameters(model: MultiTaskRCNN, name: str, key: str) -> dict[str, nn.Parameter]:
    """The parameters of a part (the trunk, a task), or those whose names match a pattern, by their names.

    Args:
        name: of `MultiTaskRCNN.parts`, or a pattern of whole parameter names (`fnmatch`, as in `checkpoint.reinit`).
        key: of the configuration, for the message.

    Raises:
        ConfigError: it stands for none. Names the key, the pattern and the nearest name.
    """
    every, parts = dict(model.named_parameters()), model.parts()
    if name in parts:
        members = {id(parameter) for parameter in parts[name].parameters()}
        found = {own: parameter for own, parameter in every.items() if id(parameter) in members}
    else:
        found = {own: parameter for own, parameter in every.items() if fnmatchcase(own, name)}
    if not found:
        raise unknown_name(key, name, _choices(model) if is_pattern(name) else list(parts))
    return found


def _choices(model: MultiTaskRCNN) -> list[str]:
    """Patterns of whole modules, and the parameters' names."""
    learning = [name for name, module in model.named_modules() if name and any(True for _ in module.parameters())]
    return [*(f"{name}.*" for name in learning), *(name for name, _ in model.named_parameters())]
