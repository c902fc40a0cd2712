"""Casting any graph to fp16 or bf16, with the places that must not be cast left in float32.

Written here and not taken from a library: what stays float32 must follow from the structure of the
graph, where converters at hand decide by the values seen or by lists of ops.
"""

from __future__ import annotations

from collections.abc import Set

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.precision.formats import Format, encoded, rounded
from ccn_deploy.exporters.precision.types import UNTYPED, Signatures
from ccn_deploy.graph.builder import GraphBuilder, stored
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.signature import OUTPUT

NO_KERNELS = {"fp16": frozenset[str](), "bf16": frozenset({"HardSwish", "Mish"})}
"""Ops that TensorRT refuses in a precision though ONNX has them in it."""


def low_nodes(forward: Graph, to: Format, wide: Set[str]) -> frozenset[str]:
    """Return the names of the forward nodes that compute in a half precision.

    All but those of ``wide``, those whose operator has no such type or no kernel, and those with a
    single number that would become 0, such as an epsilon.
    """
    signatures = Signatures(forward, to)
    return frozenset(
        node.name
        for node in forward.above()
        if node.name not in wide
        and node.op not in NO_KERNELS[to.precision]
        and signatures.can_be_low(node)
        and not any(
            _vanishes(forward.constants[tensor], to)
            for tensor in node.inputs
            if tensor in forward.constants
        )
    )


def round_constants(forward: Graph, to: Format, low: Set[str]) -> onnx.ModelProto:
    """Return a float32 copy whose low nodes read constants that the format can represent.

    A constant that float32 nodes read as well is split in two. The gradient of this copy is, to
    float32 accuracy, the gradient of what the low precision computes.

    Args:
        forward: float32.
        to: The format.
        low: Names of the nodes that compute in it.

    Raises:
        LoweringError: A constant overflows the format.
    """
    signatures = Signatures(forward, to)
    values: dict[str, NDArray[np.float32]] = {}
    reads_low: dict[str, frozenset[int]] = {}
    others: set[str] = set()
    for node in forward.nodes:
        reads_low[node.name] = signatures.low_inputs(node) if node.name in low else frozenset()
        for at, tensor in enumerate(node.inputs):
            if tensor not in forward.constants:
                continue
            if at in reads_low[node.name]:
                values[tensor] = _rounded(node, tensor, forward.constants[tensor], to)
            else:
                others.add(tensor)
    names = {name: f"{name}.{to.precision}" if name in others else name for name in values}
    builder = GraphBuilder()
    for node in forward.nodes:
        copy = node.copy()
        for at in reads_low[node.name]:
            copy.input[at] = names.get(node.inputs[at], node.inputs[at])
        builder.nodes.append(copy)
    for name, value in values.items():
        builder.constant(names[name], value)
    return builder.model_like(forward)


def to_half(graph: Graph, to: Format, low: Set[str]) -> onnx.ModelProto:
    """Return a copy that computes in a half precision; its inputs and outputs stay float32.

    Low nodes read casts of what float32 nodes made, and the reverse. Tensors that are no floats,
    and inputs that an operator wants in float32, are left alone. All nodes that are not named
    compute in float32: in a gradient graph everything behind the logits, since small slopes would
    become zeros in fp16, which an attack takes for robustness.

    Args:
        graph: Of :func:`round_constants`, or the gradient graph of one.
        to: The format.
        low: Names of the nodes that compute in it.
    """
    return _Caster(graph, to, low).run()


class _Caster:
    """Goes through the nodes in order and casts what they read to what they compute in."""

    def __init__(self, graph: Graph, to: Format, low_names: Set[str]) -> None:
        self._graph, self._to, self._low_names = graph, to, low_names
        self._signatures = Signatures(graph, to)
        self._low: set[str] = set()
        self._casts: dict[tuple[str, bool], str] = {}
        self._builder = GraphBuilder()
        self._taken = set(self._signatures.types)
        self._low_constants = {
            node.inputs[at]
            for node in graph.nodes
            if node.name in low_names
            for at in self._signatures.low_inputs(node)
        }

    def run(self) -> onnx.ModelProto:
        """Return the converted copy."""
        for node in self._graph.nodes:
            self._convert(node)
        return self._builder.model_like(
            self._graph, opset=self._to.opset, ir_version=self._to.ir_version
        )

    def _convert(self, node: Node) -> None:
        is_low = node.name in self._low_names
        low_inputs = self._signatures.low_inputs(node)
        copy = node.copy()
        for at, tensor in enumerate(node.inputs):
            if tensor in self._graph.constants:
                copy.input[at] = self._constant(tensor, is_low and at in low_inputs)
            elif at in low_inputs or (tensor in self._low and not (at == 0 and node.op in UNTYPED)):
                copy.input[at] = self._read(tensor, is_low and at in low_inputs)
        self._builder.nodes.append(copy)
        if is_low:
            for at in self._signatures.low_outputs(node):
                self._low.add(node.outputs[at])
                if node.outputs[at] == OUTPUT:
                    self._widen_logits(copy, at)

    def _widen_logits(self, node: onnx.NodeProto, at: int) -> None:
        """Let a cast after the last node return the logits."""
        name = self._fresh(f"{OUTPUT}.{self._to.precision}")
        node.output[at] = name
        self._low.discard(OUTPUT)
        self._builder.node("Cast", [name], f"{OUTPUT}.fp32", output=OUTPUT, to=TensorProto.FLOAT)

    def _read(self, tensor: str, low: bool) -> str:
        """Return the name of a tensor in the format that a node computes in."""
        if (tensor in self._low) == low:
            return tensor
        if (tensor, low) not in self._casts:
            name = self._fresh(f"{tensor}.{self._to.precision if low else 'fp32'}")
            to = self._to.onnx if low else TensorProto.FLOAT
            self._casts[tensor, low] = self._builder.node("Cast", [tensor], name, to=to)
        return self._casts[tensor, low]

    def _constant(self, name: str, low: bool) -> str:
        """Return the name of a constant in the format of a node, and keep it."""
        value = self._graph.constants[name]
        if low:
            made = encoded(name, value, self._to)
        else:
            made = stored(f"{name}.fp32" if name in self._low_constants else name, value)
        self._builder.constants[made.name] = made
        return str(made.name)

    def _fresh(self, name: str) -> str:
        while name in self._taken:
            name += "_"
        self._taken.add(name)
        return name


def _vanishes(value: NDArray[np.generic], to: Format) -> bool:
    """Whether a constant is one number, not 0, that the format has no number for but 0."""
    if value.dtype != np.float32 or value.size != 1:
        return False
    number = value.astype(np.float32).reshape(-1)
    return bool(number[0] != 0 and rounded(number, to)[0] == 0)


def _rounded(node: Node, name: str, value: NDArray[np.float32], to: Format) -> NDArray[np.float32]:
    found = rounded(value, to)
    if (np.isinf(found) & np.isfinite(value)).any():
        raise LoweringError(
            f"The constant {name!r} of node {node.name!r} has values up to "
            f"{np.abs(value).max():.3g}, which overflow {to.precision}.",
            f"Keep it in float32 with --keep-fp32 {node.name}, or export in bf16.",
        )
    return found
