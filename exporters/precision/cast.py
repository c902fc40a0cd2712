"""Casting a graph to fp16 or bf16, with the places that must not be cast left in float32.

Written here and not taken from a library: a graph of ours has a dozen ops, and what stays float32
must follow from its structure, where converters at hand decide by the values seen or by lists of
ops.
"""

from __future__ import annotations

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.precision.formats import Format, encoded, rounded
from ccn_deploy.exporters.precision.norms import find_norms, forward_nodes
from ccn_deploy.graph.signature import OUTPUT


def to_half(graph: onnx.ModelProto, to: Format) -> onnx.ModelProto:
    """Return a copy that computes in a half precision; its inputs and outputs stay float32.

    Three things stay float32. The subtraction of the mean, since what is left of an image near
    the mean would be lost if the image were rounded first. The norm branch of every compact layer,
    from the sum of squares to the division, and the bias after it. And everything behind the
    logits, the backward pass of a gradient graph: it gives the gradient, to float32 accuracy, of
    what the low precision computes, with the weights rounded as they are in the forward pass. In
    fp16 small slopes would become zeros, which an attack takes for robustness.

    Args:
        graph: Of :func:`~ccn_deploy.exporters.lowering.lower` or
            :func:`~ccn_deploy.exporters.gradient.lower_gradient`.
        to: The format.

    Raises:
        LoweringError: A weight overflows the format.
    """
    return _Caster(graph, to).run()


def half_layers(graph: onnx.ModelProto, precision: str) -> dict[str, dict[str, str]]:
    """Return, for each layer of a graph that is converted, what computes it."""
    norms = {norm.layer for norm in find_norms(graph)}
    wide = _wide_nodes(graph) - norms
    forward = forward_nodes(graph)
    return {
        node.name: {
            "compute": "fp32" if node.name in wide else precision,
            **({"norm": "fp32"} if node.name in norms else {}),
        }
        for node in graph.graph.node
        if node.name in forward and "." not in node.name
    }


class _Caster:
    """Goes through the nodes in order and casts what they read to what they compute in."""

    def __init__(self, graph: onnx.ModelProto, to: Format) -> None:
        self._graph, self._to = graph, to
        inferred = onnx.shape_inference.infer_shapes(graph, strict_mode=True).graph
        ends = [*inferred.input, *inferred.value_info, *inferred.output]
        self._constants = {c.name: c for c in graph.graph.initializer}
        self._floats = {e.name for e in ends if e.type.tensor_type.elem_type == TensorProto.FLOAT}
        self._wide_nodes = _wide_nodes(graph)
        low_nodes = [node for node in graph.graph.node if node.name not in self._wide_nodes]
        self._low_constants = {tensor for node in low_nodes for tensor in node.input}
        self._rounded_after = {norm.layer for norm in find_norms(graph)}
        self._low: set[str] = set()
        self._nodes: list[onnx.NodeProto] = []
        self._made: dict[str, TensorProto] = {}

    def run(self) -> onnx.ModelProto:
        """Return the converted copy."""
        for node in self._graph.graph.node:
            self._convert(node)
        body = self._graph.graph
        made = helper.make_graph(
            self._nodes, body.name, body.input, body.output, list(self._made.values())
        )
        return helper.make_model(
            made,
            opset_imports=[helper.make_opsetid("", self._to.opset)],
            ir_version=self._to.ir_version,
            producer_name=self._graph.producer_name,
        )

    def _convert(self, node: onnx.NodeProto) -> None:
        low = node.name not in self._wide_nodes
        copy = onnx.NodeProto()
        copy.CopyFrom(node)
        del copy.input[:]
        copy.input.extend(self._read(tensor, low) for tensor in node.input)
        self._nodes.append(copy)
        (output,) = node.output
        if low and output == OUTPUT:
            self._cast_result(copy, self._to.precision, TensorProto.FLOAT)
        elif low:
            self._low.add(output)
        elif node.name in self._rounded_after and output != OUTPUT:
            self._cast_result(copy, "fp32", self._to.onnx)
            self._low.add(output)

    def _cast_result(self, node: onnx.NodeProto, own: str, to: int) -> None:
        """Let a cast after a layer's last node have its name and output."""
        layer, output = node.name, node.output[0]
        node.name = node.output[0] = f"{layer}.{own}"
        self._nodes.append(helper.make_node("Cast", [node.name], [output], name=layer, to=to))

    def _read(self, tensor: str, low: bool) -> str:
        """Return the name of a tensor in the format that a node computes in."""
        if tensor in self._constants:
            return self._constant(tensor, low)
        if tensor not in self._floats or (tensor in self._low) == low:
            return tensor
        name = f"{tensor}.{self._to.precision if low else 'fp32'}"
        if all(node.name != name for node in self._nodes):
            to = self._to.onnx if low else TensorProto.FLOAT
            self._nodes.append(helper.make_node("Cast", [tensor], [name], name=name, to=to))
        return name

    def _constant(self, name: str, low: bool) -> str:
        """Return the name of a constant in the format of a node, and keep it."""
        made = self._constants[name]
        if made.data_type == TensorProto.FLOAT:
            value = numpy_helper.to_array(made)
            if not np.isfinite(rounded(value, self._to)).all():
                raise LoweringError(
                    f"The constant {name!r} has values up to {np.abs(value).max():.3g}, which "
                    f"overflow {self._to.precision}.",
                    "Export in bf16 or fp32.",
                )
            if low:
                made = encoded(name, value, self._to)
            elif name in self._low_constants or name.endswith(".grad.weight"):  # backward pass
                made = numpy_helper.from_array(rounded(value, self._to), f"{name}.fp32")
        self._made[made.name] = made
        return str(made.name)


def _wide_nodes(graph: onnx.ModelProto) -> set[str]:
    """Return the names of the nodes that stay float32; see :func:`to_half`."""
    forward = forward_nodes(graph)
    nodes = graph.graph.node
    mean = {node.name for node in nodes if node.op_type == "Sub" and node.name in forward}
    behind = {node.name for node in nodes} - forward
    return mean | behind | {name for norm in find_norms(graph) for name in norm.nodes}
