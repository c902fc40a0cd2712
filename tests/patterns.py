"""The exact program of every kind of layer in a lowered graph, written down a second time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference
from torch import nn

from ccn_deploy.exporters.lowering import deployed_layers
from ccn_deploy.graph.signature import BATCH, INPUT, OUTPUT
from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear, SubtractMean
from ccn_deploy.models import Classifier

PATTERNS: dict[type[nn.Module], tuple[str, ...]] = {
    SubtractMean: ("y = Sub(x, value)",),
    nn.Conv2d: ("y = Conv(x, weight, bias)",),
    CompactConv2d: (
        "squares = ReduceSumSquare(x, axes)",
        "patches = Conv(squares, ones)",
        "norm = Sqrt(patches)",
        "divisor = Add(norm, delta)",
        "product = Conv(x, weight)",
        "quotient = Div(product, divisor)",
        "y = Add(quotient, bias)",
    ),
    nn.Linear: ("y = Gemm(x, weight, bias)",),
    CompactLinear: (
        "squares = ReduceSumSquare(x, axes)",
        "norm = Sqrt(squares)",
        "divisor = Add(norm, delta)",
        "product = Gemm(x, weight)",
        "quotient = Div(product, divisor)",
        "y = Add(quotient, bias)",
    ),
    nn.BatchNorm1d: ("y = BatchNormalization(x, weight, bias, mean, variance)",),
    nn.BatchNorm2d: ("y = BatchNormalization(x, weight, bias, mean, variance)",),
    nn.LocalResponseNorm: ("y = LRN(x)",),
    nn.ReLU: ("y = Relu(x)",),
    BoundedReLU: ("y = Clip(x, low, high)",),
    nn.MaxPool2d: ("y = MaxPool(x)",),
    nn.Flatten: ("y = Flatten(x)",),
}
"""The exact program of each kind of layer, from its input x to its output y."""


def assert_pattern(graph: onnx.ModelProto, model: Classifier) -> None:
    """Ops, their order, wiring, and the constants that training does not learn."""
    nodes = list(graph.graph.node)
    constants = {c.name: c for c in graph.graph.initializer}
    layers = deployed_layers(model)
    x = INPUT
    for name, layer in layers:
        y = OUTPUT if name == layers[-1][0] else name
        for step in PATTERNS[type(layer)]:
            assert nodes, f"{name}: nothing in place of {step!r}"
            assert _step(nodes.pop(0), name, x, y) == step, name
        for what, value in _given(name, layer):
            assert np.array_equal(numpy_helper.to_array(constants[what]), value), what
        x = y
    assert not nodes


def assert_shapes(graph: onnx.ModelProto, classes: int) -> None:
    """Every shape follows by ONNX's own strict inference, and keeps the symbolic batch."""
    inferred = shape_inference.infer_shapes(
        graph, check_type=True, strict_mode=True, data_prop=True
    ).graph
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*inferred.value_info, *inferred.output)
    }
    constants = {constant.name for constant in graph.graph.initializer}
    for node in graph.graph.node:
        if constants.issuperset(node.input):  # weights that come off a grid
            continue
        shape = shapes[node.output[0]]
        assert shape[0] == BATCH and 0 not in shape, node.name
    assert shapes[OUTPUT] == [BATCH, classes]


def _given(name: str, layer: nn.Module) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the constants that the paper gives and training does not learn."""
    if isinstance(layer, CompactConv2d):
        yield f"{name}.ones", np.ones((1, 1, *layer.kernel_size), dtype=np.float32)
    if isinstance(layer, CompactConv2d | CompactLinear):
        yield f"{name}.delta", np.array(layer.delta, dtype=np.float32)


def _step(node: onnx.NodeProto, layer: str, x: str, y: str) -> str:
    """Write a node as a step of :data:`PATTERNS`, in names relative to its layer."""

    def relative(tensor: str) -> str:
        return {x: "x", y: "y"}.get(tensor, tensor.removeprefix(f"{layer}."))

    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    outputs = ", ".join(map(relative, node.output))
    return f"{outputs} = {op}({', '.join(map(relative, node.input))})"
