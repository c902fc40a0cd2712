"""What computes each layer of a converted graph, for the manifest."""

from __future__ import annotations

from collections.abc import Set

from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.structure import find_norms


def layer_precisions(graph: Graph, precision: str, low: Set[str]) -> dict[str, dict[str, str]]:
    """Return, for each layer, its ``"compute"`` and, if it has one, its ``"norm"`` precision.

    Args:
        graph: Forward, float32.
        precision: What low nodes compute in.
        low: Names of the nodes that do; a layer is low if any of its nodes is.
    """
    layers = layer_outputs(graph)
    parts: dict[str, set[str]] = {layer: set() for layer in layers}
    for node in graph.above():
        layer = layer_of(node.name, layers)
        if layer:
            parts[layer].add(node.name)
    for layer, tensor in layers.items():
        if tensor in graph.made_by:
            parts[layer].add(graph.made_by[tensor].name)
    norms = {name for norm in find_norms(graph) for name in norm.nodes}
    return {
        layer: {
            "compute": precision if nodes & low else "fp32",
            **({"norm": "fp32"} if nodes & norms else {}),
        }
        for layer, nodes in parts.items()
    }


def layer_of(node: str, layers: Set[str] | dict[str, str]) -> str:
    """Return the layer that a node is, or is a part of; "" if it is a part of none."""
    while node and node not in layers:
        node = node.rpartition(".")[0]
    return node
