"""Which parameters learn slower or faster than the rest: factors of the learning rate by name and by depth."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mtl_rcnn.config.part_names import TRUNK, is_pattern
from mtl_rcnn.engine.parameters import named_parameters
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.backbone import trunk_layers
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def lr_factors(model: MultiTaskRCNN, solver: Mapping[str, Any]) -> dict[int, float]:
    """id(parameter) -> factor of its learning rate; what is not listed has 1.

    `solver.lr_factors` gives a factor to the trunk, to a task, or to the parameters that match a pattern. A pattern
    counts more than a part, wherever it stands, and of several patterns the last. `solver.layer_decay` d multiplies
    layer l of the trunk's L + 1 layers (`trunk_layers`: stem, stages, pyramid) with d^(L - l), so that what lies
    nearest to the image learns slowest and the pyramid at its full rate (layer-wise decay of Clark et al., ELECTRA,
    2020, by stage).

    Raises:
        ConfigError: a factor of something that is not in the network, or out of range.
    """
    factors: dict[int, float] = {}
    named, decay = solver["lr_factors"], solver["layer_decay"]
    for name, factor in sorted(named.items(), key=lambda entry: is_pattern(entry[0])):
        if not factor > 0:
            raise ConfigError(f"solver.lr_factors.{name}={factor}: expected a number above 0")
        members = named_parameters(model, name, "solver.lr_factors").values()
        factors |= dict.fromkeys(map(id, members), float(factor))
    if decay is not None:
        if not 0 < decay <= 1:
            raise ConfigError(f"solver.layer_decay={decay}: expected null or a number above 0 and at most 1")
        layers = trunk_layers(model.parts()[TRUNK])
        depths = {id(p): depth for depth, layer in enumerate(reversed(layers)) for p in layer.parameters()}
        factors |= {member: factors.get(member, 1.0) * decay**depth for member, depth in depths.items()}
    return factors
