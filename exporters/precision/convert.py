"""One function from a float32 graph to another precision."""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import dataclass
from typing import Any

import onnx

from ccn_deploy.errors import LoweringError, UsageError, unknown
from ccn_deploy.exporters.canonical import canonical
from ccn_deploy.exporters.precision.calibration import Calibration, ranges
from ccn_deploy.exporters.precision.cast import low_nodes, round_constants, to_half
from ccn_deploy.exporters.precision.formats import GRIDS, HALVES, Format
from ccn_deploy.exporters.precision.islands import island_nodes, kept_nodes
from ccn_deploy.exporters.precision.qdq import to_grid
from ccn_deploy.exporters.precision.sites import quantized_sites
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.layers import layer_of, layer_outputs
from ccn_deploy.graph.signature import COTANGENTS
from ccn_deploy.graph.structure import find_norms

PRECISIONS = (*HALVES, *GRIDS)
"""What a forward graph can be converted to."""


@dataclass(frozen=True)
class Converted:
    """A graph in another precision.

    Attributes:
        graph: Its inputs and outputs are still float32.
        layers: For each layer its ``"compute"`` and, if it divides by a norm, its ``"norm"``
            precision.
        calibration: How the ranges of activations were found, and what they are; None in a
            precision that needs none, and where they were known.
    """

    graph: onnx.ModelProto
    layers: dict[str, dict[str, str]]
    calibration: dict[str, Any] | None = None


def convert(
    graph: Graph,
    precision: str,
    calibration: Calibration | Mapping[str, float] | None = None,
    keep_fp32: Sequence[str] = (),
) -> Converted:
    """Convert a float32 graph.

    The same graph and calibration give the same bytes.

    Args:
        graph: A forward graph; for fp16 and bf16 also its gradient graph. It is not changed; the
            conversion starts from its canonical form.
        precision: One of :data:`PRECISIONS`.
        calibration: Images to find the ranges of activations on, or those ranges by the names
            that :attr:`Converted.calibration` has for them; int8 and fp8 need one or the other.
        keep_fp32: Names of nodes of the forward graph, or what such names begin with, that stay
            float32 beside those that do by structure.

    Raises:
        UsageError: An unknown precision, one that needs a calibration and has none, one that
            a gradient graph cannot have, a name that no node has, or nothing to quantise.
        LoweringError: A constant overflows fp16, a layer's input has no range, or the ranges
            given are not those of this graph.
        MissingExtraError: ONNX Runtime is needed to calibrate and is not installed.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    forward = canonical(forward_part(graph))
    kept = kept_nodes(forward, keep_fp32)
    if precision in HALVES:
        return _to_half(graph, forward, HALVES[precision], kept)
    if COTANGENTS in graph.inputs:
        raise UsageError(
            f"There is no gradient graph in {precision}: rounding to a grid has slope zero.",
            "Attack it with gradients of the reference: --gradient reference.",
        )
    if calibration is None:
        raise UsageError(
            f"{precision} needs images to find the ranges of activations on.",
            "Give --dataset, or export a run that knows its data set.",
        )
    return _to_grid(forward, GRIDS[precision], calibration, kept)


def forward_part(graph: Graph) -> Graph:
    """Return the forward graph that a gradient graph begins with; a forward graph as it is."""
    if COTANGENTS not in graph.inputs:
        return graph
    builder = GraphBuilder()
    builder.nodes = [node.proto for node in graph.above()]
    model = builder.model_like(graph)
    del model.graph.input[1:], model.graph.output[1:]  # cotangents and gradients
    return Graph(model)


def _to_half(graph: Graph, forward: Graph, to: Format, kept: frozenset[str]) -> Converted:
    low = low_nodes(forward, to, island_nodes(forward) | kept)
    rounded = Graph(round_constants(forward, to, low))
    if COTANGENTS in graph.inputs:  # the gradient is that of the rounded weights
        rounded = Graph(gradient_graph(rounded))
    return Converted(to_half(rounded, to, low), _precisions(forward, to.precision, low))


def _to_grid(
    forward: Graph,
    to: Format,
    calibration: Calibration | Mapping[str, float],
    kept: frozenset[str],
) -> Converted:
    sites = quantized_sites(forward, island_nodes(forward), kept)
    if not sites:
        raise UsageError(
            f"{to.precision} would quantise nothing: what reads the image stays float32, and there "
            "is no other product with weights.",
            "Export in fp16, bf16 or fp32.",
        )
    layers = layer_outputs(forward)
    names: dict[str, str] = {}
    for site in sites:
        layer = layer_of(site.node, layers)
        taken = not layer or layer in names.values()
        names.setdefault(site.x, site.node if taken else layer)
    document = None
    if isinstance(calibration, Calibration):
        found = ranges(forward, names, calibration)
        document = {
            **calibration.document,
            "method": calibration.method,
            "ranges": {names[tensor]: limit for tensor, limit in found.items()},
        }
    else:
        if odd := sorted(calibration.keys() ^ set(names.values())):
            raise LoweringError(
                f"The range of {odd[0]!r} is missing, or is one of nothing that is quantised.",
                "Calibrate again.",
            )
        found = {tensor: calibration[name] for tensor, name in names.items()}
    return Converted(
        to_grid(forward, to, sites, found, names),
        _precisions(forward, to.precision, {site.node for site in sites}),
        document,
    )


def _precisions(graph: Graph, precision: str, low: Set[str]) -> dict[str, dict[str, str]]:
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
