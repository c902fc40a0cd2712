"""Another forward graph of the same network, written for the kernels of one runtime.

ONNX Runtime's CPU provider keeps tensors between convolutions in blocks of 8 or 16 channels, and
there fuses a convolution with an addition and a ReLU. The division, the bias and the ReLU of the
default lowering of a compact convolution run outside. With the divisor d = norm + delta > 0,

    relu(conv(x, alpha W) / d + b)  =  relu(conv(x, alpha W) + b d) * (1 / d)

exactly, and on the right the addition and the ReLU are fused; what is left is one product of two
tensors of one shape, which stays in blocks. b d and 1 / d, spread over all channels, are
convolutions with one input channel. Squares are added up by Mul and ReduceSum, whose kernels are
vectorised where ReduceSumSquare's is not; and over a window by two small matrix products, because a
convolution with one output channel computes a whole block of them. Standard ops only: every runtime
can run this graph, but others are slower on it than on the default one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import nn

from ccn_deploy.exporters.compact_nodes import as_array
from ccn_deploy.exporters.lowering import add_layer, deployed_layers, sliding_window
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.signature import BATCH, INPUT, OUTPUT
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier

TARGETS = ("onnxruntime-cpu",)
"""Runtimes that a graph can be written for."""


POINTWISE: dict[str, Any] = {"kernel_shape": (1, 1), "strides": (1, 1), "pads": (0, 0, 0, 0)}
"""Attributes of a convolution that spreads one channel over many."""


@dataclass(frozen=True)
class Stage:
    """A layer, or a compact convolution and the ReLU after it, which are lowered as one.

    Attributes:
        name: The first layer's: constants and steps are called after it.
        last: The last layer's: the stage's result is called after it.
        layer: The first layer.
        rectified: Whether a ReLU is part of it.
        x: Name of the tensor it reads.
        y: Name of the tensor it returns: that of its last layer.
    """

    name: str
    last: str
    layer: nn.Module
    rectified: bool
    x: str
    y: str


def lower_optimized(model: Classifier) -> onnx.ModelProto:
    """Return the forward graph of a network for ONNX Runtime's CPU provider.

    A compact convolution that a ReLU follows has no tensor of its own: the ReLU's has its name.

    Raises:
        LoweringError: As :func:`ccn_deploy.exporters.lowering.lower` does.
    """
    g = GraphBuilder()
    shapes = _input_shapes(model)
    for stage in stages(model):
        if isinstance(stage.layer, CompactConv2d):
            _compact_conv(g, stage, stage.layer, shapes[stage.name])
        elif isinstance(stage.layer, CompactLinear):
            _compact_linear(g, stage, stage.layer)
        else:
            add_layer(g, stage.layer, stage.name, stage.x, stage.y)
    return g.model(
        model.architecture.name,
        {INPUT: [BATCH, *model.architecture.input_shape]},
        {OUTPUT: [BATCH, model.classes]},
    )


def differs(model: Classifier) -> bool:
    """Whether there is anything in a network that is lowered otherwise: a compact layer."""
    return any(isinstance(layer, CompactConv2d | CompactLinear) for layer in model.modules())


def stages(model: Classifier) -> list[Stage]:
    """Return the layers in order of execution, compact convolutions joined with their ReLU."""
    layers = deployed_layers(model)
    found: list[Stage] = []
    x = INPUT
    at = 0
    while at < len(layers):
        name, layer = layers[at]
        rectified = isinstance(layer, CompactConv2d) and (
            at + 1 < len(layers) and type(layers[at + 1][1]) is nn.ReLU
        )
        at += 2 if rectified else 1
        last = layers[at - 1][0]
        y = OUTPUT if at == len(layers) else last
        found.append(Stage(name, last, layer, rectified, x, y))
        x = y
    return found


def _compact_conv(
    g: GraphBuilder, stage: Stage, layer: CompactConv2d, shape: tuple[int, ...]
) -> None:
    name, x = stage.name, stage.x
    channels = layer.out_channels
    window = sliding_window(layer, name)
    (top, left, _, _), (down, across) = window["pads"], window["strides"]
    high, wide = window["kernel_shape"]

    axes = g.constant(f"{name}.axes", np.array([1], dtype=np.int64))
    columns = g.constant(f"{name}.columns", window_sums(shape[3], wide, across, left).T)
    rows = g.constant(f"{name}.rows", window_sums(shape[2], high, down, top))
    delta = g.constant(f"{name}.delta", np.float32(layer.delta))
    weight = g.constant(f"{name}.weight", as_array(layer.weight) * as_array(layer.alpha))
    bias = g.constant(f"{name}.bias", as_array(layer.bias).reshape(-1, 1, 1, 1))
    ones = g.constant(f"{name}.ones", np.ones((channels, 1, 1, 1), dtype=np.float32))

    squares = g.node("Mul", [x, x], f"{name}.squares")
    summed = g.node("ReduceSum", [squares, axes], f"{name}.sum", keepdims=1)
    strips = g.node("MatMul", [summed, columns], f"{name}.strips")
    patches = g.node("MatMul", [rows, strips], f"{name}.patches")
    norm = g.node("Sqrt", [patches], f"{name}.norm")
    divisor = g.node("Add", [norm, delta], f"{name}.divisor")
    shift = g.node("Conv", [divisor, bias], f"{name}.shift", **POINTWISE)
    product = g.node("Conv", [x, weight], f"{name}.product", **window)
    scaled = g.node("Add", [product, shift], f"{name}.shifted")
    if stage.rectified:
        scaled = g.node("Relu", [scaled], f"{name}.rectified")
    reciprocal = g.node("Reciprocal", [divisor], f"{name}.reciprocal")
    factor = g.node("Conv", [reciprocal, ones], f"{name}.factor", **POINTWISE)
    g.node("Mul", [scaled, factor], stage.last, output=stage.y)


def _compact_linear(g: GraphBuilder, stage: Stage, layer: CompactLinear) -> None:
    # Divided before the product, not after it: then Gemm adds the bias, and a ReLU can be fused.
    name, x = stage.name, stage.x
    axes = g.constant(f"{name}.axes", np.array([1], dtype=np.int64))
    delta = g.constant(f"{name}.delta", np.float32(layer.delta))
    weight = g.constant(f"{name}.weight", as_array(layer.weight) * as_array(layer.alpha))
    bias = g.constant(f"{name}.bias", as_array(layer.bias))

    squares = g.node("Mul", [x, x], f"{name}.squares")
    summed = g.node("ReduceSum", [squares, axes], f"{name}.sum", keepdims=1)
    norm = g.node("Sqrt", [summed], f"{name}.norm")
    divisor = g.node("Add", [norm, delta], f"{name}.divisor")
    unit = g.node("Div", [x, divisor], f"{name}.unit")
    g.node("Gemm", [unit, weight, bias], name, output=stage.y, transB=1)


def window_sums(size: int, kernel: int, stride: int, padding: int) -> NDArray[np.float32]:
    """Return the matrix [windows, size] of zeros and ones that adds up each window of an axis."""
    starts = np.arange((size + 2 * padding - kernel) // stride + 1) * stride - padding
    offsets = np.arange(size) - starts[:, None]
    return ((offsets >= 0) & (offsets < kernel)).astype(np.float32)


def _input_shapes(model: Classifier) -> dict[str, tuple[int, ...]]:
    """Return the shape of what each layer reads, for a batch of one image."""
    found = {}
    x = torch.zeros(1, *model.architecture.input_shape)
    with torch.inference_mode():
        for name, layer in model.named_layers():
            found[name] = tuple(x.shape)
            x = layer(x)
    return found
