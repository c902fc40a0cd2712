"""Compact convolution: every input patch is L2-normalised and scaled before its kernel.

Ranjan et al., "Improving Network Robustness against Adversarial Attacks with Compact
Convolution", section 4, equation 6 and figure 4.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.errors import UsageError

PaddingMode = Literal["zeros", "reflect", "replicate", "circular"]

DELTA = 0.01
"""The paper's delta, added to the patch norm (after the root)."""

DELTA_FLOOR = 1e-6
"""The smallest delta: what is given must not be below it, and a learned one acts as if it were
this where training has driven it lower. At 0 an all-zero patch would be divided by zero."""

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


class _Compact(nn.Module):
    """What both layers share: alpha, delta, and joining them to a norm."""

    alpha: nn.Parameter
    delta: float | nn.Parameter

    def _add_scalars(self, weight: Tensor, delta: float, learn_delta: bool) -> None:
        """Set alpha to 1 and delta to its value, as a parameter if it is learned."""
        delta = float(delta)
        if not (math.isfinite(delta) and delta >= DELTA_FLOOR):
            raise UsageError(
                f"The delta of a compact layer is {delta}.",
                f"Give a number of at least {DELTA_FLOOR}; the paper's is {DELTA}.",
            )
        self.alpha = nn.Parameter(torch.ones((), device=weight.device, dtype=weight.dtype))
        self.delta = nn.Parameter(torch.full_like(self.alpha, delta)) if learn_delta else delta

    @property
    def effective_delta(self) -> float | Tensor:
        """The delta that is added to a norm; a learned one is held above :data:`DELTA_FLOOR`."""
        return self.delta if isinstance(self.delta, float) else self.delta.clamp(min=DELTA_FLOOR)

    def _scale(self, sum_of_squares: Tensor) -> Tensor:
        """Return what a product is multiplied by: ``alpha / (norm + delta)``."""
        # alpha joins the narrow divisor: one pass over the wide tensor instead of three.
        return self.alpha / (guarded_sqrt(sum_of_squares) + self.effective_delta)

    def extra_repr(self) -> str:
        """Describe the layer in ``repr(model)``."""
        learned = not isinstance(self.delta, float)
        delta = "learned" if learned else self.delta
        return f"{super().extra_repr()}, delta={delta}"


class CompactConv2d(_Compact, nn.Conv2d):
    """``y = alpha * conv(x, W) / (||patch||_2 + delta) + b`` (paper, equation 6).

    The patch norm is ``sqrt(conv(sum_c x^2, ones))``: the squares are summed over channels once,
    and a kernel of ones slides over that single channel. Zero padding adds zeros to a patch and
    nothing to its norm; another ``padding_mode`` fills in pixels, and these count.

    With ``groups`` a patch is what one kernel sees: the C_in / groups channels of its group. Each
    group's patch is normalised by its own norm, so that a depthwise convolution has one norm a
    channel, and the layer is ``groups`` compact convolutions side by side that share alpha and
    delta.

    Shapes: ``x`` is [N, C_in, H, W] or [C_in, H, W], ``W`` [C_out, C_in / groups, k_h, k_w],
    ``alpha`` a scalar, ``b`` [C_out], ``y`` [N, C_out, H', W'] as for :class:`torch.nn.Conv2d`.

    Args:
        in_channels: C_in.
        out_channels: C_out.
        kernel_size: k, or (k_h, k_w).
        stride: As for :class:`torch.nn.Conv2d`.
        padding: Likewise: pixels, ``"same"`` or ``"valid"``.
        dilation: Likewise; a dilated kernel's patch is the pixels under it, with gaps.
        groups: Number of groups of channels, each with norms of its own.
        bias: Whether ``b`` is there.
        padding_mode: ``"zeros"``, ``"reflect"``, ``"replicate"`` or ``"circular"``.
        device: Of the parameters.
        dtype: Of the parameters.
        delta: Added to every norm.
        learn_delta: Whether delta is a parameter that starts there.

    Raises:
        UsageError: A delta below :data:`DELTA_FLOOR`.
        ValueError: As :class:`torch.nn.Conv2d` raises.
    """

    def __init__(  # noqa: PLR0917 - the order of torch.nn.Conv2d
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: int | tuple[int, int] | str = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: PaddingMode = "zeros",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        delta: float = DELTA,
        learn_delta: bool = False,
    ) -> None:
        nn.Conv2d.__init__(
            self, in_channels, out_channels, kernel_size, stride, padding, dilation, groups, bias,
            padding_mode, device, dtype,
        )  # fmt: skip
        self._add_scalars(self.weight, delta, learn_delta)
        self._add_ones()

    def _add_ones(self) -> None:
        """Make the kernels of ones, one a group: no weight, so no state dict holds it."""
        inputs = 1 if self.groups == 1 else self.in_channels // self.groups
        ones = torch.ones(
            self.groups, inputs, *self.kernel_size,
            device=self.weight.device, dtype=self.weight.dtype,
        )  # fmt: skip
        self.register_buffer("ones", ones, persistent=False)
        self.ones: Tensor

    @classmethod
    def of(cls, layer: nn.Conv2d) -> CompactConv2d:
        """Return the compact form of a layer: its very parameters, alpha 1 and the paper's delta.

        Draws no random numbers; device, dtype and training mode are the layer's.
        """
        made = cls(
            layer.in_channels, layer.out_channels, _pair(layer.kernel_size),
            _pair(layer.stride), _padding(layer.padding), _pair(layer.dilation), layer.groups,
            layer.bias is not None, layer.padding_mode, "meta",
        )  # fmt: skip
        _take_over(made, layer)
        made._add_ones()
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return the compact convolution of ``x``."""
        x, padding = self.pad(x)
        convolved = self._slide(x, self.weight, padding)
        squares = x.square()
        if self.groups == 1:
            squares = squares.sum(dim=-3, keepdim=True)
        scale = self._scale(self._slide(squares, self.ones, padding))
        if self.groups > 1:
            scale = scale.repeat_interleave(self.out_channels // self.groups, dim=-3)
        if self.bias is None:
            return convolved * scale
        return torch.addcmul(self.bias.view(-1, 1, 1), convolved, scale)

    def pad(self, x: Tensor) -> tuple[Tensor, tuple[int, int] | str]:
        """Return ``x`` with the pixels around it that are not zeros, and the padding left."""
        if self.padding_mode == "zeros":
            return x, _padding(self.padding)
        around = self._reversed_padding_repeated_twice
        return F.pad(x, around, mode=self.padding_mode), (0, 0)

    def _slide(self, x: Tensor, kernels: Tensor, padding: tuple[int, int] | str) -> Tensor:
        return F.conv2d(x, kernels, None, self.stride, padding, self.dilation, self.groups)


class CompactLinear(_Compact, nn.Linear):
    """``y = alpha * W x / (||x||_2 + delta) + b``, the 1x1 case of :class:`CompactConv2d`.

    Features are put on a hypersphere of radius ``alpha`` before the dot product, which as the
    last layer is the L2-softmax of section 3.2, equation 1 (section 8.1 of the paper names the
    two equivalent; the delta only avoids a division by zero).

    Shapes: ``x`` is [..., in_features], ``y`` [..., out_features], ``alpha`` a scalar; the norm is
    that of each vector of features.

    Args:
        in_features: Length of a vector of features.
        out_features: Length of a result.
        bias: Whether ``b`` is there.
        device: Of the parameters.
        dtype: Of the parameters.
        delta: Added to every norm.
        learn_delta: Whether delta is a parameter that starts there.

    Raises:
        UsageError: A delta below :data:`DELTA_FLOOR`.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        delta: float = DELTA,
        learn_delta: bool = False,
    ) -> None:
        nn.Linear.__init__(self, in_features, out_features, bias, device, dtype)
        self._add_scalars(self.weight, delta, learn_delta)

    @classmethod
    def of(cls, layer: nn.Linear) -> CompactLinear:
        """Return the compact form of a layer; see :meth:`CompactConv2d.of`."""
        made = cls(layer.in_features, layer.out_features, layer.bias is not None, "meta")
        _take_over(made, layer)
        return made

    def forward(self, x: Tensor) -> Tensor:
        """Return the compact linear map of ``x``."""
        scale = self._scale(x.square().sum(dim=-1, keepdim=True))
        product = F.linear(x, self.weight)
        if self.bias is None:
            return product * scale
        return torch.addcmul(self.bias, product, scale)


def _take_over(made: CompactConv2d | CompactLinear, layer: nn.Conv2d | nn.Linear) -> None:
    """Give a fresh compact layer the parameters and the state of a plain one."""
    for name in ("weight", "bias"):
        setattr(made, name, getattr(layer, name))
    made._add_scalars(layer.weight, DELTA, learn_delta=False)
    made.alpha.requires_grad_(layer.weight.requires_grad)
    made.train(layer.training)


def _pair(sizes: tuple[int, ...]) -> tuple[int, int]:
    """Return the two sizes that torch types as any number."""
    height, width = sizes
    return height, width


def _padding(padding: tuple[int, ...] | str) -> tuple[int, int] | str:
    return padding if isinstance(padding, str) else _pair(padding)
