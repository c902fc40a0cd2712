"""Compact layers on their way through ``torch.onnx``: each travels as one node of its own.

The node names its layer, and :mod:`ccn_deploy.exporters.sources.module_graph` puts that layer's
nodes in its place. What torch would make of the layer's arithmetic is another graph: a power and a
sum for the squares, the floor under the root, alpha apart from the weights.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ccn_deploy.layers import CompactConv2d, CompactLinear

WRAPPED = "network"
"""Name of the exported module within what is traced."""

DOMAIN = "ccn_deploy"
"""Domain of the nodes that stand for compact layers."""


def traceable(network: nn.Module) -> None:
    """Make every compact layer of a network a single node when it is traced, in place.

    Subclasses are left alone: they may compute something else.
    """
    for name, layer in network.named_modules():
        forward = _FORWARDS.get(type(layer))
        if forward is not None:
            layer.forward = partial(forward, layer, name)


def _conv(layer: CompactConv2d, name: str, x: Tensor) -> Tensor:
    x, _ = layer.pad(x)
    # Only the sizes are wanted, which the convolution itself knows best.
    height, width = _sizes(layer, x)
    return _stand_in(layer, name, x, (x.shape[0], layer.out_channels, height, width))


def _linear(layer: CompactLinear, name: str, x: Tensor) -> Tensor:
    return _stand_in(layer, name, x, (*x.shape[:-1], layer.out_features))


_FORWARDS: dict[type[nn.Module], Callable[..., Tensor]] = {
    CompactConv2d: _conv,
    CompactLinear: _linear,
}


def _sizes(layer: CompactConv2d, x: Tensor) -> tuple[int, int]:
    """Return the height and width of a convolution's output."""
    channels = layer.in_channels
    image = torch.empty(1, channels, int(x.shape[2]), int(x.shape[3]), device="meta")
    padding: Any = layer.padding if layer.padding_mode == "zeros" else 0
    kernel = torch.empty(
        layer.out_channels, channels // layer.groups, *layer.kernel_size, device="meta"
    )
    shape = F.conv2d(image, kernel, None, layer.stride, padding, layer.dilation, layer.groups).shape
    return shape[2], shape[3]


def _stand_in(layer: nn.Module, name: str, x: Tensor, shape: tuple[int, ...]) -> Tensor:
    result: Tensor = torch.onnx.ops.symbolic(
        f"{DOMAIN}::{type(layer).__name__}",
        (x,),
        {"layer": name, "rank": x.dim()},
        dtype=x.dtype,
        shape=shape,
        version=1,
    )
    return result
