"""Operators with a sliding window: convolutions and pools, over one to three axes of space."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccn_deploy.graph.calls import Call, Function, Operator

_CONVOLUTIONS: tuple[Any, ...] = (F.conv1d, F.conv2d, F.conv3d)
_TRANSPOSED: tuple[Any, ...] = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)
_MAX_POOLS: tuple[Any, ...] = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_AVERAGE_POOLS: tuple[Any, ...] = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)


class Window:
    """Strides, dilations and padding of a node, with the standard's defaults.

    Args:
        call: The node.
        rank: Number of axes of space.
    """

    def __init__(self, call: Call, rank: int) -> None:
        self.rank = rank
        self.strides: list[int] = call.get("strides", [1] * rank)
        self.dilations: list[int] = call.get("dilations", [1] * rank)
        self.auto = call.get("auto_pad", "NOTSET")
        pads: list[int] = call.get("pads", [0] * 2 * rank)
        if self.auto == "VALID":
            pads = [0] * 2 * rank
        self.before, self.after = pads[:rank], pads[rank:]
        self.ceil = bool(call.get("ceil_mode", 0))

    @property
    def symmetric(self) -> bool:
        """True if torch can pad by itself: as much before as after, whatever the image's size."""
        return not self.auto.startswith("SAME") and self.before == self.after

    def padding(
        self, sizes: Sequence[int], kernel: Sequence[int]
    ) -> tuple[Sequence[int], Sequence[int]]:
        """Return what is padded before and after each axis of an image of these sizes."""
        if not self.auto.startswith("SAME"):
            return self.before, self.after
        before, after = [], []
        for size, width, stride, dilation in zip(
            sizes, kernel, self.strides, self.dilations, strict=True
        ):
            windows = math.ceil(size / stride)
            total = max((windows - 1) * stride + (width - 1) * dilation + 1 - size, 0)
            less, more = total // 2, total - total // 2
            before.append(less if self.auto == "SAME_UPPER" else more)
            after.append(more if self.auto == "SAME_UPPER" else less)
        return before, after

    def beyond(
        self, sizes: Sequence[int], kernel: Sequence[int], after: Sequence[int]
    ) -> Sequence[int]:
        """Return what must be added behind the padding for the last windows of ceil mode.

        ``sizes`` are those of the padded image. A window that would begin in the padding behind
        the image is left out.
        """
        if not self.ceil:
            return [0] * self.rank
        found = []
        for size, width, stride, dilation, pad in zip(
            sizes, kernel, self.strides, self.dilations, after, strict=True
        ):
            reach = (width - 1) * dilation + 1
            windows = math.ceil((size - reach) / stride) + 1
            if (windows - 1) * stride >= size - pad:
                windows -= 1
            found.append(max((windows - 1) * stride + reach - size, 0))
        return found

    def padded(
        self, x: Tensor, kernel: Sequence[int], value: float = 0.0, beyond: float = 0.0
    ) -> Tensor:
        """Pad an image for a pool: with one value, and with another what ceil mode adds behind."""
        before, after = self.padding(x.shape[2:], kernel)
        x = padded(x, before, after, value)
        return padded(x, [0] * self.rank, self.beyond(x.shape[2:], kernel, after), beyond)


def padded(x: Tensor, before: Sequence[int], after: Sequence[int], value: float = 0.0) -> Tensor:
    """Pad (or, where negative, crop) the last axes of a tensor."""
    if not any(before) and not any(after):
        return x
    pairs = zip(reversed(list(before)), reversed(list(after)), strict=True)
    return F.pad(x, [size for pair in pairs for size in pair], value=value)


def _convolution(call: Call) -> Function:
    groups = call.get("group", 1)
    windows: dict[int, Window] = {}

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.dim() - 2
        window = windows.get(rank) or windows.setdefault(rank, Window(call, rank))
        pads: Sequence[int] | int = window.before
        if not window.symmetric:
            x, pads = padded(x, *window.padding(x.shape[2:], weight.shape[2:])), 0
        result: Tensor = _CONVOLUTIONS[rank - 1](
            x, weight, bias, window.strides, pads, window.dilations, groups
        )
        return result

    return run


def _transposed(call: Call) -> Function:
    groups = call.get("group", 1)
    wanted = call.get("output_shape")

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        rank = weight.dim() - 2
        window = Window(call, rank)
        extra = call.get("output_padding", [0] * rank)
        full: Tensor = _TRANSPOSED[rank - 1](
            x, weight, None, window.strides, 0, 0, groups, window.dilations
        )
        before, after = window.before, window.after
        sizes = wanted[-rank:] if wanted else None
        if sizes is None and window.auto.startswith("SAME"):
            sizes = [n * stride for n, stride in zip(x.shape[2:], window.strides, strict=True)]
        if sizes is not None:
            totals = [n + e - s for n, e, s in zip(full.shape[2:], extra, sizes, strict=True)]
            halves = [total // 2 for total in totals]
            rest = [total - half for total, half in zip(totals, halves, strict=True)]
            before, after = (halves, rest) if window.auto == "SAME_UPPER" else (rest, halves)
        ends = [e - pad for e, pad in zip(extra, after, strict=True)]
        result = padded(full, [-pad for pad in before], ends)
        return result if bias is None else result + bias.view(-1, *[1] * rank)

    return run


def _max_pool(call: Call) -> Function:
    kernel: list[int] = call.get("kernel_shape")
    rank = len(kernel)
    window = Window(call, rank)
    if call.get("storage_order", 0):
        raise call.refuse("indices in column order are not supported")
    # torch pads at most half a window by itself.
    reach = [(k - 1) * d + 1 for k, d in zip(kernel, window.dilations, strict=True)]
    native = window.symmetric and all(
        2 * pad <= size for pad, size in zip(window.before, reach, strict=True)
    )
    pool = _MAX_POOLS[rank - 1]

    def run(x: Tensor) -> Any:
        pads: Sequence[int] | int = window.before
        ceil = window.ceil
        if not native:
            x, pads, ceil = window.padded(x, kernel, -math.inf, -math.inf), 0, False
        if call.outputs == 1:
            return pool(x, kernel, window.strides, pads, window.dilations, ceil)
        if not native:
            raise call.refuse("indices of a pool with uneven padding are not supported")
        values, places = pool(
            x, kernel, window.strides, pads, window.dilations, ceil, return_indices=True
        )
        planes = torch.arange(x.shape[0] * x.shape[1], device=x.device)
        offsets = planes.view(*x.shape[:2], *[1] * rank) * math.prod(x.shape[2:])
        return values, places + offsets

    return run


def _window_sums(x: Tensor, kernel: Sequence[int], window: Window) -> Tensor:
    """Sum every channel over each window of an image that is padded already."""
    ones = x.new_ones(1, 1, *kernel)
    planes = x.reshape(-1, 1, *x.shape[2:])
    sums: Tensor = _CONVOLUTIONS[window.rank - 1](
        planes, ones, None, window.strides, 0, window.dilations
    )
    return sums.reshape(*x.shape[:2], *sums.shape[2:])


def _average_pool(call: Call) -> Function:
    kernel: list[int] = call.get("kernel_shape")
    rank = len(kernel)
    window = Window(call, rank)
    counted = bool(call.get("count_include_pad", 0))
    native = (
        window.symmetric
        and all(dilation == 1 for dilation in window.dilations)
        and all(2 * pad <= size for pad, size in zip(window.before, kernel, strict=True))
    )
    pool = _AVERAGE_POOLS[rank - 1]

    def run(x: Tensor) -> Tensor:
        if native:
            found: Tensor = pool(x, kernel, window.strides, window.before, window.ceil, counted)
            return found
        counts = window.padded(x.new_ones(1, 1, *x.shape[2:]), kernel, float(counted))
        sums = _window_sums(window.padded(x, kernel), kernel, window)
        return sums / _window_sums(counts, kernel, window)

    return run


def _lp_pool(call: Call) -> Function:
    kernel: list[int] = call.get("kernel_shape")
    window = Window(call, len(kernel))
    p = call.get("p", 2)

    def run(x: Tensor) -> Tensor:
        return _window_sums(window.padded(x, kernel).abs().pow(p), kernel, window).pow(1 / p)

    return run


def _space(x: Tensor) -> tuple[int, ...]:
    return tuple(range(2, x.dim()))


def _global_lp_pool(call: Call) -> Function:
    p = call.get("p", 2)
    return lambda x: x.abs().pow(p).sum(_space(x), keepdim=True).pow(1 / p)


OPERATORS: dict[str, Operator] = {
    "AveragePool": _average_pool,
    "Conv": _convolution,
    "ConvTranspose": _transposed,
    "GlobalAveragePool": lambda call: lambda x: x.mean(_space(x), keepdim=True),
    "GlobalLpPool": _global_lp_pool,
    "GlobalMaxPool": lambda call: lambda x: x.amax(_space(x), keepdim=True),
    "LpPool": _lp_pool,
    "MaxPool": _max_pool,
}
