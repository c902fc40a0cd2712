"""The nodes of a compact layer: those of the paper's figure 4 and nothing else.

The scalar alpha is folded into the weights, and the root needs no floor: the floor in
:func:`ccn_deploy.layers.guarded_sqrt` is there for gradients.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.layers import CompactConv2d, CompactLinear


def add_compact_conv(g: GraphBuilder, layer: CompactConv2d, name: str, x: str, y: str) -> None:
    """Add ReduceSumSquare, Conv with ones, Sqrt, Add, Conv, Div, and Add if there is a bias.

    With groups, the first two are Mul and a Conv with ones of as many groups; where a group has
    several outputs, a 1x1 Conv with ones then copies its sum to each of them.

    A ``padding_mode`` other than zeros is no part of these nodes: ``x`` is padded already.
    """
    window = sliding_window(layer)
    if layer.groups == 1:
        patches = _sums(g, layer, name, x, window)
    else:
        patches = _sums_by_group(g, layer, name, x, window)
    divisor = _divisor(g, layer, name, patches)
    weight = g.constant(f"{name}.weight", as_array(layer.weight) * as_array(layer.alpha))
    product = g.node("Conv", [x, weight], f"{name}.product", **window)
    _quotient(g, name, product, divisor, y, bias=_bias(layer, (-1, 1, 1)))


def add_compact_linear(
    g: GraphBuilder, layer: CompactLinear, name: str, x: str, y: str, *, rank: int = 2
) -> None:
    """Add ReduceSumSquare, Sqrt, Add, Gemm, Div, and Add if there is a bias.

    A MatMul takes the place of the Gemm where ``x`` has another rank than two.
    """
    axes = g.constant(f"{name}.axes", np.array([rank - 1], dtype=np.int64))
    squares = g.node("ReduceSumSquare", [x, axes], f"{name}.squares", keepdims=1)
    divisor = _divisor(g, layer, name, squares)
    scaled = as_array(layer.weight) * as_array(layer.alpha)
    weight = g.constant(f"{name}.weight", scaled if rank == 2 else scaled.T)
    if rank == 2:
        product = g.node("Gemm", [x, weight], f"{name}.product", transB=1)
    else:
        product = g.node("MatMul", [x, weight], f"{name}.product")
    _quotient(g, name, product, divisor, y, bias=_bias(layer, (-1,)))


def _sums(g: GraphBuilder, layer: CompactConv2d, name: str, x: str, window: dict[str, Any]) -> str:
    """Add the sums of squares of all patches: [N, 1, H', W']."""
    axes = g.constant(f"{name}.axes", np.array([1], dtype=np.int64))
    ones = g.constant(f"{name}.ones", np.ones((1, 1, *layer.kernel_size), dtype=np.float32))
    squares = g.node("ReduceSumSquare", [x, axes], f"{name}.squares", keepdims=1)
    return g.node("Conv", [squares, ones], f"{name}.patches", **window)


def _sums_by_group(
    g: GraphBuilder, layer: CompactConv2d, name: str, x: str, window: dict[str, Any]
) -> str:
    """Add the sums of squares of each group's patches, for each output: [N, C_out, H', W']."""
    groups, outputs = layer.groups, layer.out_channels
    ones = g.constant(f"{name}.ones", np.ones(tuple(layer.ones.shape), dtype=np.float32))
    squares = g.node("Mul", [x, x], f"{name}.squares")
    sums = f"{name}.patches" if groups == outputs else f"{name}.groups"
    patches = g.node("Conv", [squares, ones], sums, **window)
    if groups == outputs:
        return patches
    copies = g.constant(f"{name}.copies", np.ones((outputs, 1, 1, 1), dtype=np.float32))
    return g.node("Conv", [patches, copies], f"{name}.patches", kernel_shape=(1, 1), group=groups)


def _divisor(g: GraphBuilder, layer: CompactConv2d | CompactLinear, name: str, sums: str) -> str:
    """Add the root of the sums, and delta to it."""
    value = torch.as_tensor(layer.effective_delta).item()
    delta = g.constant(f"{name}.delta", np.float32(value))
    norm = g.node("Sqrt", [sums], f"{name}.norm")
    return g.node("Add", [norm, delta], f"{name}.divisor")


def _quotient(
    g: GraphBuilder,
    name: str,
    product: str,
    divisor: str,
    y: str,
    *,
    bias: NDArray[np.float32] | None,
) -> None:
    """Add the division, and the bias if there is one; the last node has the layer's name."""
    if bias is None:
        g.node("Div", [product, divisor], name, output=y)
        return
    added = g.constant(f"{name}.bias", bias)
    quotient = g.node("Div", [product, divisor], f"{name}.quotient")
    g.node("Add", [quotient, added], name, output=y)


def sliding_window(layer: nn.Conv2d) -> dict[str, Any]:
    """Return the attributes of the sliding window that a layer's convolutions share."""
    window: dict[str, Any] = {
        "kernel_shape": layer.kernel_size,
        "strides": layer.stride,
        "pads": _pads(layer),
    }
    if layer.dilation != (1, 1):
        window["dilations"] = layer.dilation
    if layer.groups > 1:
        window["group"] = layer.groups
    return window


def as_array(tensor: Tensor | None) -> NDArray[np.float32]:
    """Return a parameter, which must be there, as float32."""
    assert tensor is not None
    return tensor.detach().cpu().numpy().astype(np.float32, copy=False)


def _pads(layer: nn.Conv2d) -> tuple[int, ...]:
    """Return the zeros at the beginning of each axis, then at the end of each."""
    if layer.padding_mode != "zeros":
        return (0, 0, 0, 0)
    # torch keeps it as (left, right, top, bottom), names such as "same" worked out.
    left, right, top, bottom = layer._reversed_padding_repeated_twice
    return (top, left, bottom, right)


def _bias(
    layer: CompactConv2d | CompactLinear, shape: tuple[int, ...]
) -> NDArray[np.float32] | None:
    return None if layer.bias is None else as_array(layer.bias).reshape(shape)
