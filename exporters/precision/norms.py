"""Finding the norm branches of a float32 graph by their structure, not by name."""

from __future__ import annotations

from dataclasses import dataclass

import onnx

from ccn_deploy.graph.signature import OUTPUT


@dataclass(frozen=True)
class Norm:
    """The norm branch of a compact layer.

    Attributes:
        layer: Name of the layer.
        nodes: Names of its nodes: the sum of squares, the sum over the patch if it is a
            convolution, the root, the addition of delta, the division and the addition of the bias.
        summed: Tensor of the sums of squares under the root.
        divisor: Tensor of norm + delta.
        product: Tensor that is divided.
    """

    layer: str
    nodes: tuple[str, ...]
    summed: str
    divisor: str
    product: str


def find_norms(graph: onnx.ModelProto) -> list[Norm]:
    """Return the norm branches of the forward part of a graph, in order of execution."""
    nodes: list[onnx.NodeProto] = list(graph.graph.node)
    forward = forward_nodes(graph)
    made_by = {tensor: node for node in nodes for tensor in node.output}

    def reader(tensor: str, op: str) -> onnx.NodeProto:
        readers = [n for n in nodes if tensor in n.input and n.name in forward]
        return next(node for node in readers if node.op_type == op)

    norms = []
    for root in (node for node in nodes if node.op_type == "Sqrt"):
        branch = [root]
        while branch[0].op_type != "ReduceSumSquare":
            branch.insert(0, made_by[branch[0].input[0]])
        divisor = reader(root.output[0], "Add")
        quotient = reader(divisor.output[0], "Div")
        result = reader(quotient.output[0], "Add")
        branch += [divisor, quotient, result]
        norms.append(
            Norm(
                layer=result.name,
                nodes=tuple(node.name for node in branch),
                summed=root.input[0],
                divisor=divisor.output[0],
                product=quotient.input[0],
            )
        )
    return norms


def forward_nodes(graph: onnx.ModelProto) -> set[str]:
    """Return the names of the nodes that the logits depend on."""
    made_by = {tensor: node for node in graph.graph.node for tensor in node.output}
    found: set[str] = set()
    ahead = [OUTPUT]
    while ahead:
        node = made_by.get(ahead.pop())
        if node is not None and node.name not in found:
            found.add(node.name)
            ahead.extend(node.input)
    return found
