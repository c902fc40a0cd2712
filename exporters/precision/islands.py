"""What stays float32 in a low precision, found by the structure of a graph.

No name, layer class or architecture decides; see ``docs/precision.md`` for the reasons.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence

from ccn_deploy.errors import UsageError
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.signature import INPUT
from ccn_deploy.graph.structure import adds_up, find_norms

NORMALISATIONS = frozenset(
    {
        "BatchNormalization", "GroupNormalization", "InstanceNormalization", "LRN",
        "LayerNormalization", "LpNormalization", "LpPool", "MeanVarianceNormalization",
        "RMSNormalization", "ReduceL2", "ReduceSumSquare",
    }
)  # fmt: skip
"""Ops that add up squares, or divide by the root of a constant variance."""

EXPONENTIALS = frozenset({"Exp", "Log", "LogSoftmax", "ReduceLogSumExp", "Softmax", "Sqrt"})
"""Ops whose result leaves the range of fp16 for arguments that are inside it, or the reverse."""

WIDE_OPS = NORMALISATIONS | EXPONENTIALS | {"QuantizeLinear", "DequantizeLinear"}

MEANS = ("GlobalAveragePool", "ReduceMean")

ENTRANCE = frozenset(
    {
        "Add", "Cast", "Clip", "Concat", "Div", "Gather", "Identity", "Mul", "Neg", "Reshape",
        "Slice", "Split", "Squeeze", "Sub", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Ops that bring an image to what the first product reads."""

UNDER_ROOTS = frozenset(
    {
        "Add", "AveragePool", "Clip", "Expand", "GlobalAveragePool", "Max", "ReduceMean",
        "ReduceSum", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Ops between squares and the root of their sum, besides products with constants that add up."""

BEHIND_ROOTS = frozenset(
    {
        "Add", "Cast", "Clip", "Expand", "Identity", "Max", "Reciprocal", "ReduceMean",
        "ReduceSum", "Reshape", "Squeeze", "Sub", "Transpose", "Unsqueeze", "Where",
    }
)  # fmt: skip
"""Ops between an exponential or a root and what it divides."""


def island_nodes(graph: Graph) -> frozenset[str]:
    """Return the names of the forward nodes that stay float32 in every precision.

    * What an image passes before the first product: the subtraction of a mean, a scale.
    * Norm branches, from the mean and the squares to the division, and the bias of a compact layer
      after it, so that its result is rounded once.
    * Normalisations that are one op, softmax, exponentials, logarithms, powers that are not whole,
      roots, and what leads from one of those to the division by it.
    """
    found = set(entrance_nodes(graph))
    for norm in find_norms(graph):
        found.update(norm.nodes)
    for node in graph.above():
        if node.op in WIDE_OPS or _fractional_power(graph, node):
            found.add(node.name)
            found.update(divisions(graph, node))
            found.update(squares(graph, node))
    return frozenset(found)


def entrance_nodes(graph: Graph) -> frozenset[str]:
    """Return the names of the nodes between the image and the first products."""
    ahead, found = {INPUT}, set()
    for node in graph.above():
        read = {tensor for tensor in node.inputs if tensor and tensor not in graph.constants}
        if node.op in ENTRANCE and read & ahead and read <= ahead:
            ahead.update(node.outputs)
            found.add(node.name)
    return frozenset(found)


def divisions(graph: Graph, root: Node) -> Iterable[str]:
    """Yield the names of the nodes from a root or an exponential to what it divides.

    If what it divides is a tensor less its mean, those too; nothing, if it divides nothing.
    """
    forward = {node.name for node in graph.above()}
    if root.op not in ("Exp", "Sqrt", "ReduceL2", "Pow"):
        return
    ahead: list[tuple[str, tuple[str, ...]]] = [(root.outputs[0], ())]
    seen = set()
    while ahead:
        tensor, path = ahead.pop()
        for node in graph.readers.get(tensor, ()):
            if (node.name, tensor) in seen or node.name not in forward:
                continue
            seen.add((node.name, tensor))
            if node.op == "Div" or (node.op == "Mul" and _inverted(graph, root, path)):
                yield from (*path, node.name)
                yield from _centring(graph, node, tensor)
            elif node.op in BEHIND_ROOTS:
                ahead += [(output, (*path, node.name)) for output in node.outputs]


def _centring(graph: Graph, division: Node, divisor: str) -> Iterable[str]:
    """Yield the names of the subtraction, and the mean, that a dividend comes from."""
    for tensor in division.inputs:
        node = graph.made_by.get(tensor)
        if tensor != divisor and node is not None and node.op == "Sub":
            mean = graph.made_by.get(node.inputs[1])
            if mean is not None and mean.op in MEANS:
                yield from (node.name, mean.name)


def squares(graph: Graph, root: Node) -> Iterable[str]:
    """Yield the names of the nodes from the squares under a root to it, of a mean before them too.

    Finds what one norm is made of in several ways, such as a variance that is the mean of squares
    less the square of the mean. Nothing, if there are no squares.
    """
    if root.op not in ("Sqrt", "Pow"):
        return
    ahead: list[tuple[str, tuple[str, ...]]] = [(root.inputs[0], ())]
    seen = set()
    while ahead:
        tensor, path = ahead.pop()
        node = graph.made_by.get(tensor)
        if node is None or node.name in seen:
            continue
        seen.add(node.name)
        if _is_square(graph, node):
            yield from (*path, node.name, *_mean_before(graph, node))
        elif node.op in UNDER_ROOTS or adds_up(graph, node):
            ahead += [(read, (*path, node.name)) for read in node.inputs if read]


def _is_square(graph: Graph, node: Node) -> bool:
    if node.op == "Mul":
        return node.inputs[0] == node.inputs[1]
    return node.op == "ReduceSumSquare" or power_of(graph, node) == 2


def _mean_before(graph: Graph, square: Node) -> Iterable[str]:
    """Yield the names of the mean that is squared, or of the one subtracted before, and of that."""
    node = graph.made_by.get(square.inputs[0])
    if node is not None and node.op == "Sub":
        yield node.name
        node = graph.made_by.get(node.inputs[1])
    if node is not None and node.op in MEANS:
        yield node.name


def _inverted(graph: Graph, root: Node, path: tuple[str, ...]) -> bool:
    """Whether what is multiplied is one over a root."""
    ops = {node.name: node.op for node in graph.nodes}
    exponent = power_of(graph, root)
    return any(ops[name] == "Reciprocal" for name in path) or (
        exponent is not None and exponent < 0
    )


def power_of(graph: Graph, node: Node) -> float | None:
    """Return the exponent of a Pow, if it is one constant."""
    return graph.number(node.inputs[1]) if node.op == "Pow" else None


def _fractional_power(graph: Graph, node: Node) -> bool:
    exponent = power_of(graph, node)
    return node.op == "Pow" and (exponent is None or exponent < 0 or exponent % 1 != 0)


def kept_nodes(graph: Graph, names: Sequence[str]) -> frozenset[str]:
    """Return the nodes that a user wants to stay float32.

    A name is that of a node, or what the names of several begin with up to a ``.``, ``/``, ``_``
    or ``:``.

    Raises:
        UsageError: No node has such a name; suggests one that is near.
    """
    nodes = [node.name for node in graph.above()]
    found: set[str] = set()
    for name in names:
        part = re.compile(re.escape(name) + (r"($|[./])" if name in nodes else r"($|[./_:])"))
        matches = [node for node in nodes if part.match(node)]
        if not matches:
            near = difflib.get_close_matches(name, nodes, n=3, cutoff=0.5) or nodes[:3]
            raise UsageError(
                f"No node of the forward graph is called {name!r}, or by a name that begins so.",
                f"Near: {', '.join(near)}.",
            )
        found.update(matches)
    return frozenset(found)
