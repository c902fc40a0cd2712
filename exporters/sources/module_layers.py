"""Layers that ``torch.onnx`` would write in a way that is of no use here.

A compact layer travels as one node of its own. The node names its layer, and
:mod:`ccn_deploy.exporters.sources.module_graph` puts that layer's nodes in its place. What torch
would make of the layer's arithmetic is another graph: a power and a sum for the squares, the floor
under the root, alpha apart from the weights.

An adaptive average whose windows differ in size is two products with constants; of torch it would
be a GatherND, which has no gradient rule.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ccn_deploy.layers import CompactConv2d, CompactLinear

WRAPPED = "network"
"""Name of the exported module within what is traced."""

DOMAIN = "ccn_deploy"
"""Domain of the nodes that stand for compact layers."""


def traceable(network: nn.Module) -> None:
    """Let every compact layer and adaptive average be traced as it should be written, in place.

    Subclasses are left alone: they may compute something else.
    """
    for name, layer in network.named_modules():
        forward = _FORWARDS.get(type(layer))
        if forward is not None:
            layer.forward = partial(forward, layer, name)


@torch.library.custom_op("ccn_deploy::compact_conv2d", mutates_args=())
def _compact_conv2d(x: Tensor, channels: int, height: int, width: int, layer: str) -> Tensor:
    raise NotImplementedError  # only traced, never run


@torch.library.custom_op("ccn_deploy::compact_linear", mutates_args=())
def _compact_linear(x: Tensor, features: int, rank: int, layer: str) -> Tensor:
    raise NotImplementedError  # as above


@_compact_conv2d.register_fake
def _shape_of_conv(x: Tensor, channels: int, height: int, width: int, layer: str) -> Tensor:
    return x.new_empty((x.shape[0], channels, height, width))


@_compact_linear.register_fake
def _shape_of_linear(x: Tensor, features: int, rank: int, layer: str) -> Tensor:
    return x.new_empty((*x.shape[:-1], features))


def _conv(layer: CompactConv2d, name: str, x: Tensor) -> Tensor:
    x, _ = layer.pad(x)
    height, width = (_size(layer, axis, int(x.shape[2 + axis])) for axis in (0, 1))
    result: Tensor = _compact_conv2d(x, layer.out_channels, height, width, name)
    return result


def _linear(layer: CompactLinear, name: str, x: Tensor) -> Tensor:
    result: Tensor = _compact_linear(x, layer.out_features, x.dim(), name)
    return result


def _pool(layer: nn.AdaptiveAvgPool2d, name: str, x: Tensor) -> Tensor:
    asked, sizes = layer.output_size, (int(x.shape[-2]), int(x.shape[-1]))
    pair = asked if isinstance(asked, tuple) else (asked, asked)
    outs = [size if out is None else out for size, out in zip(sizes, pair, strict=True)]
    if all(size % out == 0 for size, out in zip(sizes, outs, strict=True)):
        return functional.adaptive_avg_pool2d(x, asked)
    rows, columns = (_averages(size, out) for size, out in zip(sizes, outs, strict=True))
    return rows @ x @ columns.T


def _averages(size: int, out: int) -> Tensor:
    """Return float32 [out, size]: row i averages the places of window i, as PyTorch cuts them."""
    windows = [(i * size // out, -(-(i + 1) * size // out)) for i in range(out)]
    return torch.tensor(
        [[(start <= at < end) / (end - start) for at in range(size)] for start, end in windows]
    )


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    CompactConv2d: _conv,
    CompactLinear: _linear,
    nn.AdaptiveAvgPool2d: _pool,
}


def _size(layer: CompactConv2d, axis: int, size: int) -> int:
    """Return the height (axis 0) or width (1) of a convolution's output."""
    if layer.padding_mode == "zeros":
        first, last = layer._reversed_padding_repeated_twice[2 - 2 * axis : 4 - 2 * axis]
        size += first + last
    reach = layer.dilation[axis] * (layer.kernel_size[axis] - 1) + 1
    return (size - reach) // layer.stride[axis] + 1


def translations() -> dict[Any, Callable[..., Any]]:
    """Return how ``torch.onnx`` is to write the nodes that stand for compact layers."""
    from onnx import defs
    from onnxscript import values

    kind = defs.OpSchema.FormalParameter
    domain = values.Opset(DOMAIN, 1)

    def op(name: str) -> Any:
        schema = defs.OpSchema(
            name, DOMAIN, 1,
            inputs=[kind("x", "tensor(float)")],
            outputs=[kind("y", "tensor(float)")],
            attributes=[
                defs.OpSchema.Attribute("layer", defs.OpSchema.AttrType.STRING),
                defs.OpSchema.Attribute("rank", defs.OpSchema.AttrType.INT),
            ],
        )  # fmt: skip
        return values.Op(domain, name, schema)

    conv, linear = op("CompactConv2d"), op("CompactLinear")

    def write_conv(x: Any, channels: int, height: int, width: int, layer: str) -> Any:
        return conv(x, layer=layer, rank=4)

    def write_linear(x: Any, features: int, rank: int, layer: str) -> Any:
        return linear(x, layer=layer, rank=rank)

    ours = torch.ops.ccn_deploy
    return {
        ours.compact_conv2d.default: write_conv,
        ours.compact_linear.default: write_linear,
    }
