"""A recurrent network that reads the rows of a map."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class RowLSTM(nn.Module):
    """A bidirectional LSTM along every row of a map: (B, C, H, W) -> (B, 2 * hidden, H, W)."""

    def __init__(self, channels: int, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.lstm = nn.LSTM(channels, hidden, bidirectional=True)

    def forward(self, x: Tensor) -> Tensor:
        """See the class."""
        batch, channels, height, width = x.shape
        rows = x.permute(3, 0, 2, 1).reshape(width, batch * height, channels)
        # The LSTM's own call would write today's device into a trace, where it makes its zeros, and its scripted form
        # keeps a second list of its weights.
        state = rows.new_zeros(2, batch * height, self.hidden)
        weights = [self.lstm.weight_ih_l0, self.lstm.weight_hh_l0, self.lstm.bias_ih_l0, self.lstm.bias_hh_l0]
        weights += [self.lstm.weight_ih_l0_reverse, self.lstm.weight_hh_l0_reverse]
        weights += [self.lstm.bias_ih_l0_reverse, self.lstm.bias_hh_l0_reverse]
        found = torch.lstm(rows, [state, state], weights, True, 1, 0.0, self.training, True, False)[0]
        return found.view(width, batch, height, 2 * self.hidden).permute(1, 3, 2, 0)
