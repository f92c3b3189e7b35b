"""An exponential moving average of the weights, which is what evaluation and export use where there is one."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from mtl_rcnn.engine.weights import load_weights
from mtl_rcnn.errors import ConfigError


class WeightAverage:
    """The average e of a network's weights w: after update t, counted from 0, e <- d_t e + (1 - d_t) w.

    d_t = min(decay, (1 + t) / (10 + t)): the first updates forget the random start sooner, as in TensorFlow's
    ExponentialMovingAverage. e starts as the network's weights. Everything of the state dict that is a floating-point
    number is averaged, batch norm's statistics too, since those of the last step belong to other weights than e;
    the rest is copied. d_t depends on t alone, so that nothing but e needs resuming.

    Args:
        network: what is averaged.
        decay: in [0, 1), typically 0.999 or, for long trainings, 0.9999.

    Raises:
        ConfigError: a decay out of range.
    """

    def __init__(self, network: nn.Module, decay: float) -> None:
        if not 0 <= decay < 1:
            raise ConfigError(f"solver.ema={decay}: expected null or a number of at least 0 and below 1")
        self.network, self.decay = network, decay
        self.values = _copy(network)

    @torch.no_grad()
    def update(self, iteration: int) -> None:
        """Takes in the weights after step `iteration`, counted from 0."""
        decay = min(self.decay, (1 + iteration) / (10 + iteration))
        for name, tensor in self.network.state_dict().items():
            if tensor.is_floating_point():
                self.values[name].lerp_(tensor, 1 - decay)  # exact where both are equal: what is frozen stays
            else:
                self.values[name].copy_(tensor)

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Inside, the network has the average; afterwards its own weights again, bit for bit."""
        own = _copy(self.network)
        _fill(self.network, self.values)
        try:
            yield
        finally:
            _fill(self.network, own)

    def state_dict(self) -> dict[str, Tensor]:
        """The average, with the names of the network's state dict."""
        return dict(self.values)

    def load_state_dict(self, state: Mapping[str, Any], source: str) -> None:
        """Takes a checkpoint's average. Raises CheckpointError if it belongs to another network."""
        with self.applied():
            load_weights(self.network, state, source)
            self.values = _copy(self.network)


def _copy(network: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in network.state_dict().items()}


@torch.no_grad()
def _fill(network: nn.Module, values: Mapping[str, Tensor]) -> None:
    for name, tensor in network.state_dict().items():
        tensor.copy_(values[name])
