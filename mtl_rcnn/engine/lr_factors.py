"""Which parameters learn slower or faster than the rest: factors of the learning rate by part and by depth."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from torch import nn

from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.backbone import trunk_layers
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN

TRUNK = "trunk"


def lr_factors(model: MultiTaskRCNN, solver: Mapping[str, Any]) -> dict[int, float]:
    """id(parameter) -> factor of its learning rate; what is not listed has 1.

    `solver.lr_factors` gives a factor to the trunk or to a task. `solver.layer_decay` d multiplies layer l of the
    trunk's L + 1 layers (`trunk_layers`: stem, stages, pyramid) with d^(L - l), so that what lies nearest to the image
    learns slowest and the pyramid at the trunk's full rate (layer-wise decay of Clark et al., ELECTRA, 2020, by stage).

    Raises:
        ConfigError: a factor of something that is not in the network, or out of range.
    """
    factors: dict[int, float] = {}
    named, decay = solver["lr_factors"], solver["layer_decay"]
    for name, factor in named.items():
        if not factor > 0:
            raise ConfigError(f"solver.lr_factors.{name}={factor}: expected a number above 0")
        factors |= dict.fromkeys(map(id, _part(model, name).parameters()), float(factor))
    if decay is not None:
        if not 0 < decay <= 1:
            raise ConfigError(f"solver.layer_decay={decay}: expected null or a number above 0 and at most 1")
        layers = trunk_layers(model.parts()[TRUNK])
        for depth, layer in enumerate(reversed(layers)):
            factor = float(named.get(TRUNK, 1.0)) * decay**depth
            factors |= dict.fromkeys(map(id, layer.parameters()), factor)
    return factors


def _part(model: MultiTaskRCNN, name: str) -> nn.Module:
    parts = model.parts()
    if name not in parts:
        close = difflib.get_close_matches(name, parts, n=1)
        hint = f"did you mean '{close[0]}'?" if close else f"parts are {', '.join(parts)}"
        raise ConfigError(f"solver.lr_factors: the network has no part '{name}'; {hint}")
    return parts[name]
