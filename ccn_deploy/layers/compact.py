"""Compact convolution: every input patch is L2-normalised and scaled before its kernel.

Ranjan et al., "Improving Network Robustness against Adversarial Attacks with Compact
Convolution", section 4, equation 6 and figure 4.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

DELTA = 0.01
"""The paper's delta, added to the patch norm (after the root)."""

SQUARE_FLOOR = 1e-12
"""Floor under a sum of squares before its root; see :func:`guarded_sqrt`."""


def guarded_sqrt(sum_of_squares: Tensor) -> Tensor:
    """Return the square root with a floor of :data:`SQUARE_FLOOR` under its argument.

    The root's slope is infinite at 0, and 0 times infinity in the chain rule makes the input
    gradient of an all-zero patch NaN. Below the floor the norm is taken as constant, which gives
    the true derivative of equation 6 at an all-zero patch, ``alpha * W / delta``, to one part in
    ten thousand (``1e-6 / delta``), and moves no output by more than that part of an output that
    is itself below ``alpha * |W| * 1e-4``.
    """
    return sum_of_squares.clamp(min=SQUARE_FLOOR).sqrt()


class CompactConv2d(nn.Conv2d):
    """``y = alpha * conv(x, W) / (||patch||_2 + delta) + b`` (paper, equation 6).

    The patch norm is ``sqrt(conv(sum_c x^2, ones))``: the squares are summed over channels once,
    and a kernel of ones slides over that single channel. Zero padding adds zeros to a patch and
    nothing to its norm.

    Shapes: ``x`` is [N, C_in, H, W], ``W`` [C_out, C_in, k_h, k_w], ``alpha`` a scalar, ``b``
    [C_out], ``y`` [N, C_out, H', W'] as for :class:`torch.nn.Conv2d`.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k, or (k_h, k_w).
        stride: As for :class:`torch.nn.Conv2d`.
        padding: As for :class:`torch.nn.Conv2d`, in pixels; zeros are padded.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] = 0,
    ) -> None:
        super().__init__(in_channels, out_channels, kernel_size, stride=stride, padding=padding)
        self.delta = DELTA
        self.alpha = nn.Parameter(torch.ones(()))
        self.register_buffer("ones", torch.ones(1, 1, *self.kernel_size), persistent=False)
        self.ones: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """Return the compact convolution of ``x``."""
        convolved = F.conv2d(x, self.weight, None, self.stride, self.padding)
        squares = x.square().sum(dim=1, keepdim=True)
        norm = guarded_sqrt(F.conv2d(squares, self.ones, None, self.stride, self.padding))
        # alpha joins the one-channel divisor: one pass over the wide tensor instead of three.
        assert self.bias is not None
        return torch.addcmul(self.bias.view(-1, 1, 1), convolved, self.alpha / (norm + self.delta))

    def extra_repr(self) -> str:
        """Describe the layer in ``repr(model)``."""
        base: str = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{base}, delta={self.delta}"


class CompactLinear(nn.Linear):
    """``y = alpha * W x / (||x||_2 + delta) + b``, the 1x1 case of :class:`CompactConv2d`.

    Features are put on a hypersphere of radius ``alpha`` before the dot product, which as the
    last layer is the L2-softmax of section 3.2, equation 1 (section 8.1 of the paper names the
    two equivalent; the delta only avoids a division by zero).

    Shapes: ``x`` is [N, in_features], ``y`` [N, out_features], ``alpha`` a scalar.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.delta = DELTA
        self.alpha = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Return the compact linear map of ``x``."""
        norm = guarded_sqrt(x.square().sum(dim=1, keepdim=True))
        return torch.addcmul(self.bias, F.linear(x, self.weight), self.alpha / (norm + self.delta))

    def extra_repr(self) -> str:
        """Describe the layer in ``repr(model)``."""
        return f"{super().extra_repr()}, delta={self.delta}"
