"""The bounded ReLU, and the shift of the input."""

from __future__ import annotations

from torch import Tensor, nn

MEAN = 0.5
"""The paper's mean subtraction (section 5), one number for every pixel and data set."""


class SubtractMean(nn.Module):
    """``x - 0.5``: the first layer of every network, so that callers live in [0, 1].

    Shape: any; dtype is kept.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` less the mean."""
        return x - MEAN


class BoundedReLU(nn.Module):
    """``min(max(x, 0), 1)``: the bounded ReLU of Zantedeschi et al. (paper, section 5, BReLU).

    Shape: any.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Return ``x`` clipped to [0, 1]."""
        return x.clamp(0.0, 1.0)
