"""The same forward graph, written for the kernels of one runtime.

ONNX Runtime's CPU provider keeps tensors between convolutions in blocks of 8 or 16 channels, and
there fuses a convolution with an addition and a ReLU. The division, the bias and the ReLU of a
compact convolution run outside. With the divisor d = norm + delta > 0,

    relu(conv(x, alpha W) / d + b)  =  relu(conv(x, alpha W) + b d) * (1 / d)

exactly, and on the right the addition and the ReLU are fused; what is left is one product of two
tensors of one shape, which stays in blocks. b d and 1 / d, spread over all channels, are
convolutions with one input channel. Squares are added up by Mul and ReduceSum, whose kernels are
vectorised where ReduceSumSquare's is not; and over a window by two small matrix products, because a
convolution with one output channel computes a whole block of them. Standard ops only: every runtime
can run this graph, but others are slower on it than on the default one.

Compact layers are found by their structure, in any graph (:mod:`ccn_deploy.exporters.compact`);
every other node stays as it is.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import torch

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.checks import HINT, check_valid
from ccn_deploy.exporters.compact import CompactLayer, Window, compact_layers
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph

TARGETS = ("onnxruntime-cpu",)
"""Runtimes that a graph can be written for."""

POINTWISE: dict[str, Any] = {"kernel_shape": (1, 1), "strides": (1, 1), "pads": (0, 0, 0, 0)}
"""Attributes of a convolution that spreads one channel over many."""

CLOSE = 1e-9
"""Largest difference of logits in float64, of their scale, that the order of sums explains."""


def optimize(forward: Graph) -> onnx.ModelProto:
    """Return a forward graph rewritten for ONNX Runtime's CPU provider.

    A compact convolution that a ReLU follows has no tensor of its own: the ReLU's has its name.
    A graph without compact layers keeps all its nodes.

    Args:
        forward: float32; what is rewritten is its canonical form.
    """
    forward = canonical(forward)
    rewriting = _Rewriting(forward)
    layers = compact_layers(forward)
    replaced = {name: layer for layer in layers for name in layer.nodes}
    for node in forward.nodes:
        layer = replaced.get(node.name)
        if layer is None:
            rewriting.builder.nodes.append(node.proto)
        elif node.outputs[0] == layer.y:
            rewriting.add(layer)
    return rewriting.builder.model_like(forward)


def differs(forward: Graph) -> bool:
    """Whether there is anything in a graph that is written otherwise: a compact layer."""
    return bool(compact_layers(canonical(forward)))


def check_optimized(model: onnx.ModelProto, forward: Graph) -> None:
    """Assert that a rewritten graph is valid, plain, and the same function as the forward graph.

    Inputs and outputs are the same, symbolic batch included.

    The functions are compared in float64, on images of noise, zeros, ones and one grey.

    Raises:
        LoweringError: It is not.
    """
    check_valid(model)
    ends = [(list(m.graph.input), list(m.graph.output)) for m in (model, canonical(forward).model)]
    if ends[0] != ends[1]:
        raise LoweringError("The optimised graph has other inputs or outputs.", HINT)
    noise = np.random.default_rng(0).random((2, *forward.input_shape))
    flat = np.stack([np.full(forward.input_shape, value) for value in (0.0, 0.5, 1.0)])
    images = torch.from_numpy(np.concatenate([noise, flat]))
    with torch.inference_mode():
        wanted = GraphModule(forward, torch.float64)(images)
        found = GraphModule(Graph(model), torch.float64)(images)
    scale = float(wanted.abs().max())
    error = float((found - wanted).abs().max()) if found.shape == wanted.shape else np.inf
    if not error <= CLOSE * scale:
        raise LoweringError(
            f"The optimised graph is another function: its logits are off by {error / scale:.1e}.",
            HINT,
        )


class _Rewriting:
    """Nodes and constants of a rewritten graph while it is made."""

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self.builder = GraphBuilder()

    def add(self, layer: CompactLayer) -> None:
        """Add the nodes of a compact layer, and of the ReLU that is a part of it."""
        layer = replace(layer, name=self._free_name(layer))
        if layer.window is None:
            self._linear(layer)
        else:
            self._conv(layer, layer.window)

    def _free_name(self, layer: CompactLayer) -> str:
        """Return a layer's name, changed where tensors of other nodes are called after it."""
        outside = {
            tensor
            for node in self._graph.nodes
            if node.name not in layer.nodes
            for tensor in (*node.inputs, *node.outputs)
        }
        name = layer.name
        while any(tensor.startswith(f"{name}.") for tensor in outside):
            name += "_"
        return name

    def _conv(self, layer: CompactLayer, window: Window) -> None:
        name, x, g = layer.name, layer.x, self.builder
        delta = g.constant(f"{name}.delta", layer.delta)
        weight = g.constant(f"{name}.weight", layer.weight)
        ones = np.ones((len(layer.weight), 1, 1, 1), dtype=np.float32)

        summed = self._squares(layer)
        if window.is_single():
            patches = summed
        else:
            columns = g.constant(f"{name}.columns", window.sums(1).T)
            rows = g.constant(f"{name}.rows", window.sums(0))
            strips = g.node("MatMul", [summed, columns], f"{name}.strips")
            patches = g.node("MatMul", [rows, strips], f"{name}.patches")
        norm = g.node("Sqrt", [patches], f"{name}.norm")
        divisor = g.node("Add", [norm, delta], f"{name}.divisor")
        shift = ""
        if layer.bias is not None:
            bias = g.constant(f"{name}.bias", layer.bias.reshape(-1, 1, 1, 1))
            shift = g.node("Conv", [divisor, bias], f"{name}.shift", **POINTWISE)
        scaled = g.node("Conv", [x, weight], f"{name}.product", **layer.attributes)
        if shift:
            scaled = g.node("Add", [scaled, shift], f"{name}.shifted")
        if layer.rectified:
            scaled = g.node("Relu", [scaled], f"{name}.rectified")
        reciprocal = g.node("Reciprocal", [divisor], f"{name}.reciprocal")
        spread = g.constant(f"{name}.ones", ones)
        factor = g.node("Conv", [reciprocal, spread], f"{name}.factor", **POINTWISE)
        g.node("Mul", [scaled, factor], layer.last, output=layer.y)

    def _linear(self, layer: CompactLayer) -> None:
        # Divided before the product, not after it: then Gemm adds the bias, and a ReLU is fused.
        name, x, g = layer.name, layer.x, self.builder
        delta = g.constant(f"{name}.delta", layer.delta)
        reads = [g.constant(f"{name}.weight", layer.weight)]
        if layer.bias is not None:
            reads.append(g.constant(f"{name}.bias", layer.bias.reshape(-1)))
        summed = self._squares(layer)
        norm = g.node("Sqrt", [summed], f"{name}.norm")
        divisor = g.node("Add", [norm, delta], f"{name}.divisor")
        unit = g.node("Div", [x, divisor], f"{name}.unit")
        g.node("Gemm", [unit, *reads], layer.last, output=layer.y, **layer.attributes)

    def _squares(self, layer: CompactLayer) -> str:
        g = self.builder
        axes = g.constant(f"{layer.name}.axes", np.array([1], dtype=np.int64))
        squares = g.node("Mul", [layer.x, layer.x], f"{layer.name}.squares")
        return g.node("ReduceSum", [squares, axes], f"{layer.name}.sum", keepdims=1)
