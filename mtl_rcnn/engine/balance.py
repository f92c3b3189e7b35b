"""The configured balancing method, and its connection to the network."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.distributed as dist
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from mtl_rcnn.balancing import GradientBalancer, Scalarizer
from mtl_rcnn.config.resolve import resolve
from mtl_rcnn.engine.distributed import Ranks
from mtl_rcnn.errors import ConfigError
from mtl_rcnn.modeling.feature_split import FeatureSplit
from mtl_rcnn.modeling.meta_arch import MultiTaskRCNN


def build_balancer(cfg: DictConfig, model: MultiTaskRCNN, state: Mapping[str, Any] | None) -> Scalarizer:
    """The configured balancer over the network's loss parts."""
    node = OmegaConf.to_container(cfg.balancing, resolve=True)
    cls = resolve(node.pop("_target_"), Scalarizer, "balancing._target_")
    balancer = cls(model.loss_names(), **node)
    if state is not None:
        balancer.load_state_dict(state)
    return balancer


def share_gradients(balancer: Scalarizer, model: MultiTaskRCNN, ranks: Ranks, solver: DictConfig) -> None:
    """Lets a method on gradients see those of every task, if it is one.

    Raises:
        ConfigError: nothing of the trunk learns.
    """
    if not isinstance(balancer, GradientBalancer):
        return
    if not any(parameter.requires_grad for parameter in model.backbone.parameters()):
        raise ConfigError(
            f"balancing: {type(balancer).__name__} combines the tasks' gradients in the trunk, and the whole trunk is "
            "frozen; choose balancing=sum, or train a part of it (solver.freeze, model.backbone.freeze_at)"
        )
    if ranks.world > 1:
        # A group of its own: gradients of the heads are on their way in the default one while the tasks' meet.
        group = dist.new_group()
        balancer.reduce = partial(_sum_over, group)
    balancer.overflows = solver.precision == "float16"
    trunk = model.backbone if balancer.at == "parameters" else None
    model.split = FeatureSplit(balancer.tasks, balancer.combine, trunk)


def _sum_over(group: dist.ProcessGroup, tensor: Tensor) -> Tensor:
    dist.all_reduce(tensor, group=group)
    return tensor
