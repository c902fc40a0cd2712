"""Where a forward graph is quantised: the two operands of its products with weights."""

from __future__ import annotations

from collections.abc import Set
from dataclasses import dataclass

from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.structure import channel_axis


@dataclass(frozen=True)
class Site:
    """A convolution or matrix product that is quantised.

    Attributes:
        node: Its name.
        x: Tensor of activations that it reads.
        weight: Its constant.
        axis: The axis of output channels in that constant.
    """

    node: str
    x: str
    weight: str
    axis: int


def quantized_sites(graph: Graph, islands: Set[str], kept: Set[str]) -> list[Site]:
    """Return the sites in order of execution.

    They are all products of activations with a constant but three kinds. Those in islands: the
    sum over patches in a norm branch is no product of weights. Those that read the image, with no
    product above them: 255 steps would round an image of low contrast, which a compact layer
    brings back to full scale, to nothing, and small adversarial changes would be rounded away,
    which looks like robustness; they are a small part of the work. And transposed convolutions and
    products with more than one matrix, for which runtimes have no such kernels.

    Args:
        graph: Forward, float32.
        islands: Names of the nodes that stay float32 by structure.
        kept: Names of the nodes that a user keeps in float32.
    """
    wide = first_products(graph, islands) | islands | kept
    sites = []
    for node in graph.above():
        axis = channel_axis(graph, node)
        if axis is not None and node.name not in wide:
            sites.append(Site(node.name, node.inputs[0], node.inputs[1], axis))
    return sites


def first_products(graph: Graph, islands: Set[str]) -> frozenset[str]:
    """Return the names of the products with weights that have no other one above them.

    Args:
        graph: Forward.
        islands: Names of nodes that do not count as products: norm branches.
    """
    behind: set[str] = set()
    first = set()
    for node in graph.above():
        is_product = channel_axis(graph, node) is not None and node.name not in islands
        below = any(tensor in behind for tensor in node.inputs)
        if is_product and not below:
            first.add(node.name)
        if is_product or below:
            behind.update(node.outputs)
    return frozenset(first)
