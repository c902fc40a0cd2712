"""Putting the operands of every matrix product on a grid of int8 or fp8 numbers.

In the explicit form that TensorRT and ONNX Runtime read: QuantizeLinear and DequantizeLinear
around float32 ops. LayerOutputs have one scale a tensor, weights one a channel, and no grid has an
offset. Ranges come from :mod:`ccn_deploy.exporters.precision.calibration`; the pairs are placed
here, because a library's placement also quantises what a product is divided by.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ccn_deploy.exporters.precision.formats import Format, encoded
from ccn_deploy.exporters.precision.norms import find_norms
from ccn_deploy.exporters.precision.sites import Site, quantized_sites


def to_grid(graph: onnx.ModelProto, to: Format, ranges: Mapping[str, float]) -> onnx.ModelProto:
    """Return a copy of a forward graph with quantised operands.

    A compact layer takes its norm, in float32, of the very numbers that its product multiplies:
    what rounding or clipping does to their length is divided out again. The product itself is not
    quantised before it is divided, since patches of small norm would be lost in one scale for all.

    Args:
        graph: float32.
        to: The grid's format.
        ranges: Largest absolute input to represent of each layer that is quantised.
    """
    sites = {site.x: site for site in quantized_sites(graph)}
    weights = {site.weight: site for site in sites.values()}
    constants = {c.name: c for c in graph.graph.initializer}
    nodes: list[onnx.NodeProto] = []
    made = [c for c in graph.graph.initializer if c.name not in weights]
    renamed: dict[str, str] = {}
    for node in graph.graph.node:
        for tensor in node.input:
            if tensor in sites and tensor not in renamed:
                site = sites[tensor]
                renamed[tensor] = _activation(nodes, made, site, to, ranges[site.layer])
            if tensor in weights:
                weight = numpy_helper.to_array(constants[tensor])
                renamed[tensor] = _weight(nodes, made, weights[tensor], to, weight)
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(renamed.get(tensor, tensor) for tensor in node.input)
        nodes.append(copy)
    body = graph.graph
    return helper.make_model(
        helper.make_graph(nodes, body.name, body.input, body.output, made),
        opset_imports=graph.opset_import,
        ir_version=graph.ir_version,
        producer_name=graph.producer_name,
    )


def quantized_layers(graph: onnx.ModelProto, precision: str) -> dict[str, dict[str, str]]:
    """Return, for each layer of a graph that is converted, what computes it."""
    norms = {norm.layer for norm in find_norms(graph)}
    low = {site.layer for site in quantized_sites(graph)}
    return {
        node.name: {
            "compute": precision if node.name in low else "fp32",
            **({"norm": "fp32"} if node.name in norms else {}),
        }
        for node in graph.graph.node
        if "." not in node.name
    }


def _activation(
    nodes: list[onnx.NodeProto], made: list[onnx.TensorProto], site: Site, to: Format, limit: float
) -> str:
    """Add what puts a site's activations on a grid; return the tensor's name."""
    name = f"{site.layer}.input"
    scale = numpy_helper.from_array(np.array(limit / to.largest, np.float32), f"{name}.scale")
    zero = encoded(f"{name}.zero", np.zeros((), np.float32), to)
    made += [scale, zero]
    for op, reads, result in (
        ("QuantizeLinear", site.x, f"{name}.{to.precision}"),
        ("DequantizeLinear", f"{name}.{to.precision}", name),
    ):
        nodes.append(helper.make_node(op, [reads, scale.name, zero.name], [result], name=result))
    return name


def _weight(
    nodes: list[onnx.NodeProto],
    made: list[onnx.TensorProto],
    site: Site,
    to: Format,
    weight: NDArray[np.float32],
) -> str:
    """Add a site's weights as numbers of the grid; return the name of what they stand for."""
    largest = np.abs(weight).reshape(len(weight), -1).max(axis=1)
    scale = (np.where(largest > 0, largest, 1) / to.largest).astype(np.float32)
    steps = weight / scale.reshape(-1, *[1] * (weight.ndim - 1))
    made.append(encoded(site.weight, np.clip(steps, -to.largest, to.largest), to))
    made.append(numpy_helper.from_array(scale, f"{site.weight}.scale"))
    made.append(encoded(f"{site.weight}.zero", np.zeros(len(weight), np.float32), to))
    result = f"{site.weight}.fp32"
    reads = [site.weight, f"{site.weight}.scale", f"{site.weight}.zero"]
    nodes.append(helper.make_node("DequantizeLinear", reads, [result], name=result, axis=0))
    return result
