"""Where a forward graph is quantised: the two operands of its matrix products."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from ccn_deploy.exporters.precision.norms import find_norms


@dataclass(frozen=True)
class Site:
    """A convolution or matrix product that is quantised.

    Attributes:
        layer: The layer it belongs to.
        node: Name of the node.
        x: Tensor of activations it reads.
        weight: Its constant, with output channels first.
    """

    layer: str
    node: str
    x: str
    weight: str


def quantized_sites(graph: onnx.ModelProto) -> list[Site]:
    """Return the sites in order of execution: all but those of the norm branches."""
    branch = {name for norm in find_norms(graph) for name in norm.nodes}
    return [
        Site(node.name.partition(".")[0], node.name, node.input[0], node.input[1])
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm") and node.name not in branch
    ]
