"""Element types of the tensors of a graph, and which of them an operator lets be low."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from onnx import TensorProto, defs, shape_inference

from ccn_deploy.exporters.precision.formats import Format
from ccn_deploy.graph.graph import Graph, Node

UNTYPED = frozenset({"Cast", "Shape", "Size"})
"""Ops that give the same whatever float they read."""

ELEMENT: dict[int, str] = {
    TensorProto.FLOAT16: "tensor(float16)",
    TensorProto.BFLOAT16: "tensor(bfloat16)",
}


def tensor_types(model: onnx.ModelProto) -> dict[str, int]:
    """Return the ``TensorProto`` type of every tensor of a graph.

    By ONNX's inference; where that gives up (it does on some ops that it defines as functions), an
    output has the type of the input that is declared alike.
    """
    inferred = shape_inference.infer_shapes(model).graph
    ends = [*inferred.input, *inferred.value_info, *inferred.output]
    types = {end.name: int(end.type.tensor_type.elem_type) for end in ends}
    types |= {constant.name: int(constant.data_type) for constant in inferred.initializer}
    opset = Graph(model).opset
    for node in model.graph.node:
        if any(tensor and not types.get(tensor) for tensor in node.output):
            schema = defs.get_schema(node.op_type, opset)
            declared: dict[str, int] = {}
            for tensor, formal in zip(node.input, _formals(schema.inputs), strict=False):
                declared.setdefault(formal, types.get(tensor, 0))
            for tensor, formal in zip(node.output, _formals(schema.outputs), strict=False):
                types[tensor] = types.get(tensor) or declared.get(formal, 0)
    return types


class Signatures:
    """Which inputs and outputs of a graph's nodes can be a low float in place of float32.

    Follows the type variables of ONNX's own operator schemas: a tensor declared as
    ``tensor(float)`` (the scales of Resize), or by a variable that does not range over the format,
    stays float32.

    Args:
        graph: float32.
        to: The low format.
    """

    def __init__(self, graph: Graph, to: Format) -> None:
        self.types = tensor_types(graph.model)
        self._opset = max(graph.opset, to.opset)
        self._element = ELEMENT[to.onnx]

    def is_float(self, tensor: str) -> bool:
        """Whether a tensor is float32 in the float32 graph."""
        return self.types.get(tensor) == TensorProto.FLOAT

    def low_inputs(self, node: Node) -> frozenset[int]:
        """Return the positions of a node's float32 inputs that can be low."""
        if node.op in UNTYPED:
            return frozenset()
        schema = defs.get_schema(node.op, self._opset)
        formals = zip(range(len(node.inputs)), _formals(schema.inputs), strict=False)
        return frozenset(
            at
            for at, formal in formals
            if self.is_float(node.inputs[at]) and self._allows(schema, formal)
        )

    def low_outputs(self, node: Node) -> frozenset[int]:
        """Return the positions of a node's outputs that are low where its inputs are."""
        schema = defs.get_schema(node.op, self._opset)
        read = [formal for _, formal in zip(node.inputs, _formals(schema.inputs), strict=False)]
        formals = zip(range(len(node.outputs)), _formals(schema.outputs), strict=False)
        return frozenset(
            at
            for at, formal in formals
            if self.is_float(node.outputs[at]) and formal in read and self._allows(schema, formal)
        )

    def can_be_low(self, node: Node) -> bool:
        """Whether a node can compute in the format: its first float input and all it returns."""
        floats = [at for at, tensor in enumerate(node.inputs) if self.is_float(tensor)]
        returned = {at for at, tensor in enumerate(node.outputs) if self.is_float(tensor)}
        return (
            bool(floats)
            and floats[0] in self.low_inputs(node)
            and returned <= self.low_outputs(node)
        )

    def _allows(self, schema: defs.OpSchema, formal: str) -> bool:
        return any(
            self._element in constraint.allowed_type_strs
            for constraint in schema.type_constraints
            if constraint.type_param_str == formal
        )


def _formals(formals: Sequence[defs.OpSchema.FormalParameter]) -> Iterator[str]:
    """Yield the declared type of each parameter; a variadic one is the last, for ever."""
    for formal in formals:
        yield formal.type_str
    while formals and formals[-1].option == defs.OpSchema.FormalParameterOption.Variadic:
        yield formals[-1].type_str
