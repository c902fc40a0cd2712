"""From a network to an ONNX graph: one short function per kind of layer.

Compact layers are in :mod:`ccn_deploy.exporters.compact_nodes`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
from torch import nn

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters import compact_nodes
from ccn_deploy.exporters.compact_nodes import add_compact_conv, add_compact_linear, as_array
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.signature import BATCH, INPUT, OUTPUT
from ccn_deploy.layers import MEAN, BoundedReLU, CompactConv2d, CompactLinear, SubtractMean
from ccn_deploy.models import Classifier

Lowering = Callable[[GraphBuilder, Any, str, str, str], None]
"""Adds a layer's nodes, given the builder, the layer, its name, its input and its output."""


def lower(model: Classifier) -> onnx.ModelProto:
    """Return the forward graph of a network in float32: images in [0, 1] to logits.

    Layers that do nothing in deployment (dropout) leave no node. See
    :mod:`ccn_deploy.graph.builder` for the names.

    Raises:
        LoweringError: A kind of layer, or an option of one, that has no lowering.
    """
    builder = GraphBuilder()
    layers = deployed_layers(model)
    x = INPUT
    for name, layer in layers:
        y = OUTPUT if name == layers[-1][0] else name
        add_layer(builder, layer, name, x, y)
        x = y
    return builder.model(
        model.architecture.name,
        {INPUT: [BATCH, *model.architecture.input_shape]},
        {OUTPUT: [BATCH, model.classes]},
    )


def add_layer(builder: GraphBuilder, layer: nn.Module, name: str, x: str, y: str) -> None:
    """Add the nodes of one layer that reads the tensor ``x`` and returns ``y``.

    Raises:
        LoweringError: As :func:`lower` does.
    """
    lowering = LOWERINGS.get(type(layer))
    if lowering is None:
        raise LoweringError(
            f"Layer {name!r} is a {type(layer).__name__}, which has no lowering to ONNX.",
            f"Known: {', '.join(sorted(kind.__name__ for kind in LOWERINGS))}.",
        )
    lowering(builder, layer, name, x, y)


def deployed_layers(model: Classifier) -> list[tuple[str, nn.Module]]:
    """Return (name, layer) in order of execution, without those that only act in training."""
    return [(n, layer) for n, layer in model.named_layers() if not isinstance(layer, nn.Dropout)]


def _mean(g: GraphBuilder, layer: SubtractMean, name: str, x: str, y: str) -> None:
    g.node("Sub", [x, g.constant(f"{name}.value", np.float32(MEAN))], name, output=y)


def _conv(g: GraphBuilder, layer: nn.Conv2d, name: str, x: str, y: str) -> None:
    weight = g.constant(f"{name}.weight", as_array(layer.weight))
    bias = g.constant(f"{name}.bias", as_array(layer.bias))
    g.node("Conv", [x, weight, bias], name, output=y, **sliding_window(layer, name))


def _compact_conv(g: GraphBuilder, layer: CompactConv2d, name: str, x: str, y: str) -> None:
    _require(layer.padding_mode == "zeros", name, "a convolution with another padding than zeros")
    add_compact_conv(g, layer, name, x, y)


def _linear(g: GraphBuilder, layer: nn.Linear, name: str, x: str, y: str) -> None:
    weight = g.constant(f"{name}.weight", as_array(layer.weight))
    bias = g.constant(f"{name}.bias", as_array(layer.bias))
    g.node("Gemm", [x, weight, bias], name, output=y, transB=1)


def _batch_norm(
    g: GraphBuilder, layer: nn.BatchNorm1d | nn.BatchNorm2d, name: str, x: str, y: str
) -> None:
    known = layer.affine and layer.track_running_stats
    _require(known, name, "a batch normalisation without scale, shift or running statistics")
    values = {
        "weight": layer.weight,
        "bias": layer.bias,
        "mean": layer.running_mean,
        "variance": layer.running_var,
    }
    constants = [g.constant(f"{name}.{what}", as_array(value)) for what, value in values.items()]
    g.node("BatchNormalization", [x, *constants], name, output=y, epsilon=layer.eps)


def _local_response_norm(
    g: GraphBuilder, layer: nn.LocalResponseNorm, name: str, x: str, y: str
) -> None:
    # An even number of neighbours leans to one side in torch and to the other in ONNX.
    _require(layer.size % 2 == 1, name, "a normalisation over an even number of channels")
    g.node(
        "LRN", [x], name, output=y,
        size=layer.size, alpha=layer.alpha, beta=layer.beta, bias=float(layer.k),
    )  # fmt: skip


def _relu(g: GraphBuilder, layer: nn.ReLU, name: str, x: str, y: str) -> None:
    g.node("Relu", [x], name, output=y)


def _bounded_relu(g: GraphBuilder, layer: BoundedReLU, name: str, x: str, y: str) -> None:
    low = g.constant(f"{name}.low", np.float32(0))
    high = g.constant(f"{name}.high", np.float32(1))
    g.node("Clip", [x, low, high], name, output=y)


def _max_pool(g: GraphBuilder, layer: nn.MaxPool2d, name: str, x: str, y: str) -> None:
    plain = _pair(layer.dilation) == (1, 1) and not layer.ceil_mode and not layer.return_indices
    _require(plain, name, "a max-pool with dilation, ceil_mode or indices")
    g.node(
        "MaxPool", [x], name, output=y,
        kernel_shape=_pair(layer.kernel_size),
        strides=_pair(layer.stride),
        pads=_pair(layer.padding) * 2,
    )  # fmt: skip


def _flatten(g: GraphBuilder, layer: nn.Flatten, name: str, x: str, y: str) -> None:
    _require((layer.start_dim, layer.end_dim) == (1, -1), name, "a partial flatten")
    g.node("Flatten", [x], name, output=y, axis=1)


LOWERINGS: dict[type[nn.Module], Lowering] = {
    SubtractMean: _mean,
    nn.Conv2d: _conv,
    CompactConv2d: _compact_conv,
    nn.Linear: _linear,
    CompactLinear: add_compact_linear,
    nn.BatchNorm1d: _batch_norm,
    nn.BatchNorm2d: _batch_norm,
    nn.LocalResponseNorm: _local_response_norm,
    nn.ReLU: _relu,
    BoundedReLU: _bounded_relu,
    nn.MaxPool2d: _max_pool,
    nn.Flatten: _flatten,
}
"""By exact type: a subclass may compute something else."""


def sliding_window(layer: nn.Conv2d, name: str) -> dict[str, Any]:
    """Return the attributes of the sliding window that a layer's convolutions share."""
    plain = layer.groups == 1 and _pair(layer.dilation) == (1, 1) and layer.padding_mode == "zeros"
    _require(plain, name, "a convolution with groups, dilation or another padding than zeros")
    _require(not isinstance(layer.padding, str), name, "a convolution with padding by name")
    return compact_nodes.sliding_window(layer)


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _require(holds: bool, name: str, what: str) -> None:
    if not holds:
        raise LoweringError(
            f"Layer {name!r} is {what}, which has no lowering to ONNX.",
            "Use the layers that the architectures of this package use.",
        )
