"""Compact layers of any graph, taken apart into the numbers that they compute with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.structure import Norm, find_norms


@dataclass(frozen=True)
class Window:
    """The sliding window of a convolution in two dimensions.

    Attributes:
        size: Height and width of what it slides over.
        kernel: Height and width.
        strides: Steps down and across.
        pads: Zeros before and after the rows and columns: top, left, bottom, right.
        dilations: Distances between its rows and columns.
    """

    size: tuple[int, int]
    kernel: tuple[int, int]
    strides: tuple[int, int]
    pads: tuple[int, int, int, int]
    dilations: tuple[int, int]

    def is_single(self) -> bool:
        """Whether every position is a window of its own."""
        return self.kernel == self.strides == (1, 1) and not any(self.pads)

    def sums(self, axis: int) -> NDArray[np.float32]:
        """Return the matrix [windows, size] of zeros and ones that adds up each window."""
        size, stride, dilation = self.size[axis], self.strides[axis], self.dilations[axis]
        before, after = self.pads[axis], self.pads[axis + 2]
        extent = dilation * (self.kernel[axis] - 1) + 1
        starts = np.arange((size + before + after - extent) // stride + 1) * stride - before
        offsets = np.arange(size) - starts[:, None]
        inside = (offsets >= 0) & (offsets < extent) & (offsets % dilation == 0)
        return np.asarray(inside, dtype=np.float32)


@dataclass(frozen=True)
class CompactLayer:
    """A compact layer, y = product(x, weight) / (norm + delta) + bias, and the ReLU after it.

    Attributes:
        name: The layer's: constants and steps are called after it.
        nodes: Names of all its nodes.
        x: Tensor that it reads.
        y: Tensor that it returns.
        last: Name of the node that returns it.
        weight: Of the product; a kernel [out, in, height, width] or a matrix.
        delta: What is added to the norm.
        bias: One number an output channel, or None.
        rectified: Whether a ReLU is part of it.
        attributes: Of the product.
        window: Of a convolution; None of a linear layer.
    """

    name: str
    nodes: tuple[str, ...]
    x: str
    y: str
    last: str
    weight: NDArray[np.float32]
    delta: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    rectified: bool
    attributes: Mapping[str, Any]
    window: Window | None


def compact_layers(graph: Graph) -> tuple[CompactLayer, ...]:
    """Return the compact layers of a forward graph in order of execution.

    Those with groups or with padding by name, those that share their norm with another layer and
    linear ones on tensors of more than two dimensions are left out.
    """
    found = (_Reading(graph, norm).layer() for norm in find_norms(graph) if norm.kind == "compact")
    return tuple(layer for layer in found if layer is not None)


class _Reading:
    """Follows the nodes of one compact layer; gives up at the first that is not as expected."""

    def __init__(self, graph: Graph, norm: Norm) -> None:
        self._graph, self._norm = graph, norm
        self._nodes: list[Node] = []

    def layer(self) -> CompactLayer | None:
        """Return the layer, or None if it is of another form."""
        graph = self._graph
        product = graph.made_by.get(self._norm.product)
        shifted = graph.made_by.get(self._norm.divisor)
        if product is None or shifted is None or shifted.op != "Add":
            return None
        delta = self._one_constant(shifted)
        root = graph.made_by.get(_other(graph, shifted))
        quotient = next(
            (r for r in graph.readers[self._norm.divisor] if r.inputs[0] == self._norm.product),
            None,
        )
        if delta is None or root is None or root.op != "Sqrt" or quotient is None:
            return None
        self._nodes += [product, shifted, root, quotient]
        window = self._window(product)
        if not self._is_norm_of(root, product, window) or not self._is_plain(product):
            return None
        last, bias = self._bias(quotient, 3 if product.op == "Conv" else 1)
        rectified = False
        if product.op == "Conv":
            relu = self._only_reader(last.outputs[0], "Relu")
            rectified, last = relu is not None, relu or last
        if not self._is_closed(last):
            return None
        return CompactLayer(
            self._norm.name,
            tuple(node.name for node in self._nodes),
            product.inputs[0],
            last.outputs[0],
            last.name,
            graph.constants[product.inputs[1]],
            delta,
            bias,
            rectified,
            dict(product.attributes),
            window,
        )

    def _is_plain(self, product: Node) -> bool:
        if product.op == "Gemm":
            scales = product.attributes.get("alpha", 1.0) == 1.0
            return len(product.inputs) == 2 and scales and not product.attributes.get("transA", 0)
        return (
            product.op == "Conv"
            and len(product.inputs) == 2
            and product.attributes.get("group", 1) == 1
            and product.attributes.get("auto_pad", "NOTSET") == "NOTSET"
            and len(self._graph.shapes[product.inputs[0]]) == 4
        )

    def _window(self, product: Node) -> Window | None:
        if product.op != "Conv" or product.inputs[1] not in self._graph.constants:
            return None
        shape = self._graph.shapes[product.inputs[0]]
        get = product.attributes.get
        down, across = self._graph.constants[product.inputs[1]].shape[2:4]
        return Window(
            (int(shape[2]), int(shape[3])),
            (down, across),
            _pair(get("strides", (1, 1))),
            tuple(get("pads", (0, 0, 0, 0))),
            _pair(get("dilations", (1, 1))),
        )

    def _is_norm_of(self, root: Node, product: Node, window: Window | None) -> bool:
        """Whether a root is that of the sum of squares of each patch that a product reads."""
        node = self._graph.made_by.get(root.inputs[0])
        if node is not None and node.op == "Conv":
            if window is None or not self._is_plain(node) or self._window(node) != window:
                return False
            kernel = self._graph.constants[node.inputs[1]]
            if kernel.shape[:2] != (1, 1) or (kernel != 1).any():
                return False
            self._nodes.append(node)
            node = self._graph.made_by.get(node.inputs[0])
        elif window is not None and not window.is_single():
            return False
        return node is not None and self._sums_squares(node, product.inputs[0])

    def _sums_squares(self, node: Node, x: str) -> bool:
        """Whether a node, with the one before it, adds up the squares of x over axis 1."""
        axes = self._graph.constants.get(node.inputs[1]) if len(node.inputs) > 1 else None
        rank = len(self._graph.shapes[x])
        if axes is None or [int(axis) % rank for axis in axes.reshape(-1)] != [1]:
            return False
        if not node.attributes.get("keepdims", 1):
            return False
        self._nodes.append(node)
        if node.op == "ReduceSumSquare":
            return node.inputs[0] == x
        square = self._graph.made_by.get(node.inputs[0])
        if node.op != "ReduceSum" or square is None:
            return False
        self._nodes.append(square)
        if square.op == "Pow":
            return square.inputs[0] == x and self._graph.number(square.inputs[1]) == 2
        return square.op == "Mul" and square.inputs == (x, x)

    def _bias(self, quotient: Node, rank: int) -> tuple[Node, NDArray[np.float32] | None]:
        """Return the addition of the bias and its numbers, or the quotient and None."""
        add = self._only_reader(quotient.outputs[0], "Add")
        if add is None:
            return quotient, None
        weight = self._graph.constants[self._nodes[0].inputs[1]]
        transposed = self._nodes[0].op == "Conv" or self._nodes[0].attributes.get("transB", 0)
        channels = weight.shape[0 if transposed else 1]
        bias = next(
            (self._graph.constants[t] for t in add.inputs if t in self._graph.constants), None
        )
        per_channel = (channels,) + (1,) * (rank - 1)
        if bias is None or bias.size != channels or bias.shape[-rank:] != per_channel:
            self._nodes.remove(add)
            return quotient, None
        return add, bias

    def _only_reader(self, tensor: str, op: str) -> Node | None:
        """Return, and count in, the one node that reads a tensor, if it is of an op."""
        readers = self._graph.readers.get(tensor, ())
        if len(readers) != 1 or readers[0].op != op or tensor in self._graph.outputs:
            return None
        self._nodes.append(readers[0])
        return readers[0]

    def _one_constant(self, node: Node) -> NDArray[np.float32] | None:
        """Return the one number that a node reads."""
        values = [self._graph.constants[t] for t in node.inputs if t in self._graph.constants]
        return values[0].reshape(()) if len(values) == 1 and values[0].size == 1 else None

    def _is_closed(self, last: Node) -> bool:
        """Whether nothing outside reads what is inside."""
        names = {node.name for node in self._nodes}
        return all(
            tensor not in self._graph.outputs
            and all(reader.name in names for reader in self._graph.readers.get(tensor, ()))
            for node in self._nodes
            if node is not last
            for tensor in node.outputs
        )


def _other(graph: Graph, node: Node) -> str:
    """Return the tensor that a node reads and that is no constant; "" if there is none."""
    return next((tensor for tensor in node.inputs if tensor not in graph.constants), "")


def _pair(value: Sequence[int]) -> tuple[int, int]:
    return int(value[0]), int(value[1])
