"""Normalisations of a graph, found by what its nodes compute and not by their names.

From every root the search goes up to the squares that it is taken of, and down to the division
that it takes part in. What must be computed precisely in a low precision, and what a fused
kernel may replace, are both told by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.shapes import reached_by_images

FUSED = {
    "GroupNormalization": "group",
    "InstanceNormalization": "instance",
    "LRN": "lrn",
    "LayerNormalization": "layer",
    "LogSoftmax": "softmax",
    "LpNormalization": "lp",
    "MeanVarianceNormalization": "instance",
    "RMSNormalization": "rms",
    "Softmax": "softmax",
}
"""Operators that are a whole normalisation, and its kind."""

_PLACES = frozenset(
    {"Cast", "Expand", "Flatten", "Identity", "Pad", "Reshape", "Squeeze", "Transpose", "Unsqueeze"}
)
_SUMS = frozenset({"AveragePool", "Conv", "GlobalAveragePool", "MatMul", "ReduceMean", "ReduceSum"})
_WITH_CONSTANT = frozenset({"Add", "Clip", "Div", "Max", "Mul", "Sub"})
_UP = _PLACES | _SUMS | _WITH_CONSTANT
_DOWN = _PLACES | _WITH_CONSTANT | {"Reciprocal"}
_MEANS = frozenset({"AveragePool", "GlobalAveragePool", "ReduceMean"})

PRODUCTS = ("Conv", "Gemm", "MatMul")
"""Operators that multiply activations by weights."""


@dataclass(frozen=True)
class Norm:
    """One normalisation.

    Attributes:
        kind: ``"compact"`` (a product of x over the norm of the same x's patches), ``"layer"``,
            ``"instance"``, ``"group"`` (centred, over the features, the image, or a reshaped
            tensor), ``"rms"`` (by the mean of squares), ``"lp"`` (a tensor by its own norm),
            ``"lrn"``, ``"softmax"``, or ``"root"`` (the root of a sum of squares, used otherwise).
        name: Name of the node that gives its result, which names the layer.
        nodes: Names of its nodes in order of execution: mean and difference, squares and their
            sums, root, divisor, division and, of a compact layer, the addition of the bias. The
            product that a compact layer divides is not among them.
        squared: Tensor that is squared; the input of a fused operator.
        summed: Tensor of sums under the root; ``""`` where one operator does it all.
        divisor: Tensor that is divided by, or that stands for its reciprocal in a product; ``""``
            where there is none.
        product: Tensor that is divided (a compact layer's product with its weights); ``""`` where
            there is none.
        result: Tensor that the last node makes.
    """

    kind: str
    name: str
    nodes: tuple[str, ...]
    squared: str
    summed: str
    divisor: str
    product: str
    result: str


def find_norms(graph: Graph) -> tuple[Norm, ...]:
    """Return the normalisations of a graph, in order of execution of their results."""
    search = _Search(graph)
    found = [norm for node in graph.nodes for norm in search.at(node)]
    order = {node.name: at for at, node in enumerate(graph.nodes)}
    return tuple(sorted(found, key=lambda norm: order[norm.name]))


def channel_axis(
    graph: Graph, node: Node, constants: Mapping[str, Any] | None = None
) -> int | None:
    """Return the axis of output channels in the weight of a product; None of any other node.

    Args:
        graph: That the node is in.
        node: Any.
        constants: Arrays or tensors that no image changes, by name; those that the graph stores if
            not given.
    """
    constants = graph.constants if constants is None else constants
    if node.op not in PRODUCTS or node.inputs[0] in constants:
        return None
    weight = constants.get(node.inputs[1])
    if weight is None:
        return None
    if node.op == "Conv":
        return 0
    if weight.ndim != 2 or node.attributes.get("transA", 0):
        return None
    return 0 if node.op == "Gemm" and node.attributes.get("transB", 0) else 1


def adds_up(graph: Graph, node: Node) -> bool:
    """Whether a node multiplies by a constant that has no negative number."""
    if node.op not in ("Conv", "MatMul", "Mul", "Div"):
        return False
    factors = [graph.constants.get(tensor) for tensor in node.inputs[:2]]
    return any(factor is not None and bool((factor >= 0).all()) for factor in factors)


@dataclass(frozen=True)
class _Climb:
    """The way from a root up to the square."""

    nodes: tuple[Node, ...]
    squared: str


@dataclass(frozen=True)
class _Descent:
    """The way from a root down to the division."""

    nodes: tuple[Node, ...]
    divisor: str
    product: str


class _Search:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.order = {node.name: at for at, node in enumerate(graph.nodes)}
        self.moving = reached_by_images(graph)

    def at(self, node: Node) -> Iterator[Norm]:
        """Yield the normalisation whose operator, root or division by a sum this node is."""
        if node.op in FUSED:
            kind = FUSED[node.op]
            maker = self.graph.made_by.get(node.inputs[0])
            if kind == "instance" and maker is not None and maker.op == "Reshape":
                kind = "group"  # groups as channels, which is how exporters write it
            yield Norm(kind, node.name, (node.name,), node.inputs[0], "", "", "", node.outputs[0])
        elif node.op == "Div":
            yield from self._softmax(node)
        elif self._is_root(node):
            yield from self._root(node)

    def _moving(self, node: Node) -> list[str]:
        """Return the inputs of a node that depend on the images."""
        return [name for name in node.inputs if name in self.moving]

    def _is_root(self, node: Node) -> bool:
        if self._moving(node)[:1] != [node.inputs[0]]:
            return False
        if node.op in ("ReduceL2", "Sqrt"):
            return True
        return node.op == "Pow" and 0 < abs(self.graph.number(node.inputs[1]) or 0) < 1

    def _is_square(self, node: Node) -> bool:
        if node.op == "Pow":
            return self.graph.number(node.inputs[1]) == 2
        return node.op == "ReduceSumSquare" or (
            node.op == "Mul" and node.inputs[0] == node.inputs[1]
        )

    def _softmax(self, division: Node) -> Iterator[Norm]:
        """Find exponentials that are divided by their own sum."""
        dividend, divisor = division.inputs
        power, total = self.graph.made_by.get(dividend), self.graph.made_by.get(divisor)
        if power is None or total is None or power.op != "Exp" or total.op != "ReduceSum":
            return
        if total.inputs[0] == dividend:
            names, result = (power.name, total.name, division.name), division.outputs[0]
            yield Norm(
                "softmax", division.name, names, power.inputs[0], divisor, divisor, dividend, result
            )

    def _root(self, root: Node) -> Iterator[Norm]:
        climb = _Climb((), root.inputs[0]) if root.op == "ReduceL2" else self._climb(root)
        if climb is None:
            return
        down = self._descend(root)
        centre = self._centre(climb.squared)
        kind = self._kind(climb, down, root, centre) if down else "root"
        nodes = [*climb.nodes, root, *centre]
        if down:
            nodes += [*down.nodes, *(self._centre(down.product) if centre else ())]
        if kind == "compact" and (bias := self._bias(nodes)):
            nodes.append(bias)
        nodes.sort(key=lambda node: self.order[node.name])
        yield Norm(
            kind=kind,
            name=nodes[-1].name,
            nodes=tuple(dict.fromkeys(node.name for node in nodes)),
            squared=climb.squared,
            summed=root.outputs[0] if root.op == "ReduceL2" else root.inputs[0],
            divisor=down.divisor if down else "",
            product=down.product if down else "",
            result=nodes[-1].outputs[0],
        )

    def _climb(self, root: Node) -> _Climb | None:
        nodes: list[Node] = []
        tensor = root.inputs[0]
        while (node := self.graph.made_by.get(tensor)) is not None:
            nodes.insert(0, node)
            if self._is_square(node):
                return _Climb(tuple(nodes), node.inputs[0])
            moving = self._moving(node)
            if node.op not in _UP or len(moving) != 1:
                return None
            tensor = moving[0]
        return None

    def _descend(self, root: Node) -> _Descent | None:
        """Follow a root to the nearest division by it, or product with its reciprocal."""
        inverse = root.op == "Pow" and (self.graph.number(root.inputs[1]) or 0) < 0
        ahead: list[tuple[str, tuple[Node, ...], bool]] = [(root.outputs[0], (), inverse)]
        while ahead:
            tensor, nodes, inverse = ahead.pop(0)
            for node in self.graph.readers.get(tensor, ()):
                moving = self._moving(node)
                if node.op == ("Mul" if inverse else "Div") and len(moving) == 2:
                    other = moving[0] if moving[1] == tensor else moving[1]
                    if inverse or moving[1] == tensor:
                        return _Descent((*nodes, node), tensor, other)
                elif node.op == "Div" and not inverse and moving == [tensor] == [node.inputs[1]]:
                    ahead.append((node.outputs[0], (*nodes, node), True))  # 1 / root
                elif node.op in _DOWN and len(moving) == 1:
                    turned = inverse != (node.op == "Reciprocal")
                    ahead.append((node.outputs[0], (*nodes, node), turned))
        return None

    def _centre(self, tensor: str) -> list[Node]:
        """Return the mean and the difference that a centred tensor comes from."""
        node = self.graph.made_by.get(tensor)
        if node is None or node.op != "Sub":
            return []
        mean = self.graph.made_by.get(node.inputs[1])
        if mean is None or mean.op not in _MEANS or mean.inputs[0] != node.inputs[0]:
            return []
        return [mean, node]

    def _kind(self, climb: _Climb, down: _Descent, root: Node, centre: list[Node]) -> str:
        if self._is_compact(climb, down, root):
            return "compact"
        if centre:
            return self._centred_kind(centre)
        if self._origin(down.product) != self._origin(climb.squared):
            return "root"
        if root.op == "Pow" and abs(self.graph.number(root.inputs[1]) or 0) != 0.5:
            return "lrn"
        return "rms" if any(node.op in _MEANS for node in climb.nodes) else "lp"

    def _centred_kind(self, centre: list[Node]) -> str:
        mean, difference = centre
        source = self.graph.made_by.get(difference.inputs[0])
        axes = mean.attributes.get("axes")
        if axes is None and len(mean.inputs) > 1:
            value = self.graph.constants.get(mean.inputs[1])
            axes = None if value is None else value.reshape(-1).tolist()
        if source is not None and source.op == "Reshape":
            return "group"
        spatial = mean.op == "GlobalAveragePool" or (axes is not None and len(axes) > 1)
        return "instance" if spatial and sorted(axes or (2, 3)) in ([2, 3], [-2, -1]) else "layer"

    def _is_compact(self, climb: _Climb, down: _Descent, root: Node) -> bool:
        """Tell whether a product of x is divided by the norm of the patches of the same x."""
        product = self.graph.made_by.get(self._origin(down.product))
        if product is None or product.op not in PRODUCTS or down.nodes[-1].op != "Div":
            return False
        if self._origin(product.inputs[0]) != self._origin(climb.squared):
            return False
        if root.op == "Pow" and self.graph.number(root.inputs[1]) != 0.5:
            return False
        return all(
            node.op not in _MEANS and node.op != "MatMul" and self._only_adds(node)
            for node in climb.nodes
        )

    def _only_adds(self, node: Node) -> bool:
        """Tell whether a convolution's kernel is all ones; other nodes have none."""
        if node.op != "Conv":
            return True
        kernel = self.graph.constants.get(node.inputs[1])
        return kernel is not None and bool(np.all(kernel == 1))

    def _origin(self, tensor: str) -> str:
        """Follow a tensor up through nodes that only cast or rename it."""
        while (node := self.graph.made_by.get(tensor)) is not None and node.op in (
            "Cast",
            "Identity",
        ):
            tensor = node.inputs[0]
        return tensor

    def _bias(self, nodes: list[Node]) -> Node | None:
        """Return the addition of a constant to a quotient that nothing else reads."""
        last = max(nodes, key=lambda node: self.order[node.name])
        readers = self.graph.readers.get(last.outputs[0], ())
        if len(readers) == 1 and readers[0].op == "Add" and len(self._moving(readers[0])) == 1:
            return readers[0]
        return None
