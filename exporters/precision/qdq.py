"""Putting the operands of matrix products on a grid of int8 or fp8 numbers.

In the explicit form that TensorRT and ONNX Runtime read: QuantizeLinear and DequantizeLinear
around float32 ops. Activations have one scale a tensor, weights one an output channel, and no grid
has an offset. Ranges come from :mod:`ccn_deploy.exporters.precision.calibration`; the pairs are
placed here, because a library's placement also quantises what a product is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import onnx

from ccn_deploy.exporters.precision.formats import Format, encoded
from ccn_deploy.exporters.precision.sites import Site
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.structure import find_norms


def to_grid(
    graph: Graph,
    to: Format,
    sites: Sequence[Site],
    ranges: Mapping[str, float],
    names: Mapping[str, str],
) -> onnx.ModelProto:
    """Return a copy of a forward graph with quantised operands.

    A compact layer takes its norm, in float32, of the very numbers that its product multiplies:
    what rounding or clipping does to their length is divided out again. The product itself is not
    quantised before it is divided, since patches of small norm would be lost in one scale for all.
    Whatever else reads the same tensor, such as a skip connection, reads it unrounded.

    Args:
        graph: float32.
        to: The grid's format.
        sites: What is quantised.
        ranges: By tensor: the largest absolute value to represent.
        names: By tensor: what its scale is named after.
    """
    grid = _Grid(graph, to)
    nodes = grid.builder.nodes
    readers = _readers(graph, sites)
    by_node = {site.node: site for site in sites}
    for node in graph.nodes:
        copy = node.copy()
        site = by_node.get(node.name)
        for at, tensor in enumerate(node.inputs):
            if node.name in readers.get(tensor, ()):
                copy.input[at] = grid.activation(tensor, names[tensor], ranges[tensor])
        if site is not None:
            copy.input[1] = grid.weight(site.weight, site.axis)
        nodes.append(copy)
    return grid.builder.model_like(graph)


def _readers(graph: Graph, sites: Sequence[Site]) -> dict[str, set[str]]:
    """Return, by tensor that is quantised, the nodes that read it off the grid."""
    readers: dict[str, set[str]] = {}
    for site in sites:
        readers.setdefault(site.x, set()).add(site.node)
    for norm in find_norms(graph):
        product = graph.made_by.get(norm.product) if norm.kind == "compact" else None
        if product is not None and product.name in readers.get(product.inputs[0], ()):
            readers[product.inputs[0]].update(norm.nodes)
    return readers


class _Grid:
    """Nodes and constants of a quantised graph while it is made."""

    def __init__(self, graph: Graph, to: Format) -> None:
        self._graph, self._to = graph, to
        self._made: dict[tuple[str, int], str] = {}
        self.builder = GraphBuilder()

    def activation(self, tensor: str, name: str, limit: float) -> str:
        """Add, once, what puts a tensor on the grid; return the name of what it stands for."""
        result = f"{name}.input"
        if (tensor, -1) in self._made:
            return self._made[tensor, -1]
        scale, zero = f"{result}.scale", f"{result}.zero"
        self.builder.constant(scale, np.float32(limit / self._to.largest))
        self._keep(encoded(zero, np.zeros((), np.float32), self._to))
        low = f"{result}.{self._to.precision}"
        self.builder.node("QuantizeLinear", [tensor, scale, zero], low)
        self.builder.node("DequantizeLinear", [low, scale, zero], result)
        self._made[tensor, -1] = result
        return result

    def weight(self, name: str, axis: int) -> str:
        """Add, once, a constant as numbers of the grid; return the name of what it stands for.

        A channel of zeros has the scale of one.
        """
        if (name, axis) in self._made:
            return self._made[name, axis]
        value = self._graph.constants[name]
        largest = np.abs(value).max(axis=tuple(set(range(value.ndim)) - {axis}))
        scale = (np.where(largest > 0, largest, 1) / self._to.largest).astype(np.float32)
        steps = value / np.expand_dims(scale, tuple(set(range(value.ndim)) - {axis}))
        alone = len(self._graph.readers[name]) == 1  # then its numbers can take its name
        stored = name if alone else f"{name}.{self._to.precision}{axis}"
        self._keep(encoded(stored, np.clip(steps, -self._to.largest, self._to.largest), self._to))
        self.builder.constant(f"{stored}.scale", scale)
        self._keep(encoded(f"{stored}.zero", np.zeros(len(scale), np.float32), self._to))
        result = f"{stored}.fp32"
        reads = [stored, f"{stored}.scale", f"{stored}.zero"]
        self.builder.node("DequantizeLinear", reads, result, axis=axis)
        self._made[name, axis] = result
        return result

    def _keep(self, constant: onnx.TensorProto) -> None:
        self.builder.constants[constant.name] = constant
