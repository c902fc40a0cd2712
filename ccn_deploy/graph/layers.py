"""Layers of a graph: what a table by layer shows, in a network of any architecture."""

from __future__ import annotations

from collections.abc import Collection

from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.signature import OUTPUT
from ccn_deploy.graph.structure import find_norms

UNSHOWN = frozenset(
    {
        "Cast", "CastLike", "Concat", "Dropout", "Expand", "Flatten", "Gather", "Identity",
        "Reshape", "Slice", "Split", "Squeeze", "Tile", "Transpose", "Unsqueeze",
    }
)  # fmt: skip
"""Operators that compute nothing: their results are other nodes' results in another place."""


def layer_outputs(graph: Graph) -> dict[str, str]:
    """Return the layers that lead to the logits: name -> tensor, in order of execution.

    A node ``conv1.norm`` is a part of the layer ``conv1`` where there is a node ``conv1``, and is
    not shown; nor are the inner nodes of normalisations, nor nodes that compute nothing. The last
    layer's tensor is the graph's output.

    Raises:
        GraphError: The graph does not run; see :attr:`Graph.shapes`.
    """
    output = OUTPUT if OUTPUT in graph.outputs else graph.outputs[0]
    names = {node.name for node in graph.nodes}
    inner = {name for norm in find_norms(graph) for name in norm.nodes if name != norm.name}
    found: dict[str, str] = {}
    for node in graph.above(output):
        tensor = output if output in node.outputs else node.outputs[0]
        visible = tensor in graph.floats and node.name not in inner and _shown(node, names)
        if tensor == output or visible:
            found[node.name] = tensor
    return found


def layer_of(node: str, layers: Collection[str]) -> str:
    """Return the layer that a node is, or is a part of; "" if it is a part of none."""
    while node and node not in layers:
        node = node.rpartition(".")[0]
    return node


def _shown(node: Node, names: set[str]) -> bool:
    if node.op in UNSHOWN:
        return False
    parts = node.name.split(".")
    return not any(".".join(parts[:end]) in names for end in range(1, len(parts)))
