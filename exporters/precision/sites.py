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
        x: Tensor of activations that the layer reads.
        weight: Its constant, with output channels first.
    """

    layer: str
    x: str
    weight: str


def quantized_sites(graph: onnx.ModelProto) -> list[Site]:
    """Return the sites in order of execution.

    They are all products but two kinds. The sum over patches in a norm branch is no product of
    weights. And the first product reads the image, which 255 steps would round: an image of low
    contrast, which a compact layer brings back to full scale, would come through as nothing, and
    small adversarial changes would be rounded away, which looks like robustness. It is one to two
    hundredths of the work.
    """
    branch = {name for norm in find_norms(graph) for name in norm.nodes}
    products = [
        node
        for node in graph.graph.node
        if node.op_type in ("Conv", "Gemm") and node.name not in branch
    ]
    return [
        Site(node.name.partition(".")[0], node.input[0], node.input[1]) for node in products[1:]
    ]
