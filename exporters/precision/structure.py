"""What must be true of a converted graph, asserted apart from the conversion.

The conversion decides node by node what to cast. This looks at the types of the tensors that came
of it: it walks from every root to the sum of squares above it and the division below it.
"""

from __future__ import annotations

from collections.abc import Iterator

import onnx
from onnx import TensorProto, shape_inference

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.checks import check_plain, check_valid
from ccn_deploy.exporters.lowering import deployed_layers
from ccn_deploy.exporters.precision.formats import GRIDS, HALVES
from ccn_deploy.graph.signature import COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier

HINT = "Nothing was written; this is a bug in the exporter, please report it."

ENDS = ({INPUT, OUTPUT}, {INPUT, OUTPUT, COTANGENTS, GRADIENTS})
"""Inputs and outputs of a forward and of a gradient graph."""

PRODUCTS = ("Conv", "Gemm")
BETWEEN = ("Relu", "Clip", "MaxPool", "Flatten")
"""Ops that have no business in float32 in a half precision."""


def check_precision(graph: onnx.ModelProto, precision: str, model: Classifier) -> None:
    """Assert the structural rule of low precision on a converted graph.

    * Inputs and outputs are float32.
    * Every compact layer has its root, and every tensor from the operand of the sum of squares to
      the quotient is float32; nothing is quantised or cast on the way.
    * All other products of the forward pass have both operands in the precision, and in a half
      precision so have activations and pools. On a grid the first product is float32.
    * In a gradient graph, every float behind the logits is float32.

    Raises:
        LoweringError: Names the first layer that breaks the rule, and how.
    """
    check_valid(graph)
    check_plain(graph)
    typed = _TypedGraph(graph)
    typed.check_ends()
    for name, layer in deployed_layers(model):
        if isinstance(layer, CompactConv2d | CompactLinear):
            typed.check_norm(name, convolution=isinstance(layer, CompactConv2d))
    if precision in HALVES:
        typed.check_half(HALVES[precision].onnx)
    else:
        typed.check_grid(GRIDS[precision].onnx)
    typed.check_backward()


class _TypedGraph:
    """A graph with the type of every tensor."""

    def __init__(self, graph: onnx.ModelProto) -> None:
        inferred = shape_inference.infer_shapes(graph, check_type=True, strict_mode=True).graph
        self._ends = [*inferred.input, *inferred.output]
        self._types: dict[str, int] = {
            value.name: value.type.tensor_type.elem_type
            for value in (*self._ends, *inferred.value_info)
        }
        self._types |= {constant.name: constant.data_type for constant in graph.graph.initializer}
        self._nodes = list(graph.graph.node)
        self._made_by = {tensor: node for node in self._nodes for tensor in node.output}
        self._forward = {node.name for node in self._above(OUTPUT)}

    def check_ends(self) -> None:
        """Assert that inputs and outputs are the ones that are known, in float32."""
        names = {end.name for end in self._ends}
        if names not in ENDS:
            raise LoweringError(f"The graph has other ends: {', '.join(sorted(names))}.", HINT)
        for end in self._ends:
            self._require_wide(end.name, "The graph")

    def check_norm(self, layer: str, *, convolution: bool) -> None:
        """Assert that the norm branch of a layer is whole and float32 throughout."""
        where = f"Layer {layer!r}"
        root = next((node for node in self._nodes if node.name == f"{layer}.norm"), None)
        if root is None or root.op_type != "Sqrt":
            raise LoweringError(f"{where} has no root of a sum of squares.", HINT)
        node = root
        for op in ["Conv", "ReduceSumSquare"] if convolution else ["ReduceSumSquare"]:
            self._require_wide_node(node, where)
            node = self._made_by.get(node.input[0], onnx.NodeProto())
            self._require_op(node, op, f"{where}, above its root,")
        self._require_wide_node(node, where)
        node = root
        for op in ("Add", "Div"):
            readers = [n for n in self._nodes if node.output[0] in n.input]
            readers = [n for n in readers if n.name in self._forward]
            node = readers[0] if len(readers) == 1 else onnx.NodeProto()
            self._require_op(node, op, f"{where}, below its root,")
            self._require_wide_node(node, where)

    def check_half(self, low: int) -> None:
        """Assert that what is to compute in a half precision does."""
        for node in self._low_candidates((*PRODUCTS, *BETWEEN)):
            for operand in node.input[:2] if node.op_type in PRODUCTS else node.input[:1]:
                if self._types[operand] != low:
                    raise self._wrong(node, operand, low)

    def check_grid(self, low: int) -> None:
        """Assert that both operands of every product but the first come off a grid."""
        for at, node in enumerate(self._low_candidates(PRODUCTS)):
            for operand in node.input[:2]:
                made_by = self._made_by.get(operand, onnx.NodeProto())
                on_grid = made_by.op_type == "DequantizeLinear"
                if on_grid and self._types[made_by.input[0]] != low:
                    raise self._wrong(node, made_by.input[0], low)
                if on_grid != (at > 0):
                    what = "a quantised" if on_grid else "an unquantised"
                    raise LoweringError(f"Node {node.name!r} reads {what} {operand!r}.", HINT)

    def check_backward(self) -> None:
        """Assert that every float behind the logits is float32."""
        floats = {TensorProto.FLOAT, *(half.onnx for half in HALVES.values())}
        for node in self._nodes:
            for tensor in node.output:
                if node.name not in self._forward and self._types[tensor] in floats:
                    self._require_wide(tensor, f"Node {node.name!r}")

    def _low_candidates(self, ops: tuple[str, ...]) -> Iterator[onnx.NodeProto]:
        """Yield the nodes of some ops in the forward pass, without those of norm branches."""
        roots = [node for node in self._nodes if node.op_type == "Sqrt"]
        branches = {node.name for root in roots for node in self._branch(root)}
        for node in self._nodes:
            if node.op_type in ops and node.name in self._forward - branches:
                yield node

    def _branch(self, root: onnx.NodeProto) -> Iterator[onnx.NodeProto]:
        node: onnx.NodeProto | None = root
        while node is not None and node.op_type != "ReduceSumSquare":
            yield node
            node = self._made_by.get(node.input[0])

    def _above(self, tensor: str) -> list[onnx.NodeProto]:
        """Return the nodes that a tensor depends on."""
        found: dict[str, onnx.NodeProto] = {}
        ahead = [tensor]
        while ahead:
            node = self._made_by.get(ahead.pop())
            if node is not None and node.name not in found:
                found[node.name] = node
                ahead.extend(node.input)
        return list(found.values())

    def _require_op(self, node: onnx.NodeProto, op: str, where: str) -> None:
        if node.op_type != op:
            raise LoweringError(f"{where} has {node.op_type or 'nothing'} in place of {op}.", HINT)

    def _require_wide_node(self, node: onnx.NodeProto, where: str) -> None:
        for tensor in (*node.input, *node.output):
            if self._types[tensor] != TensorProto.INT64:  # axes
                self._require_wide(tensor, where)

    def _require_wide(self, tensor: str, where: str) -> None:
        if self._types[tensor] != TensorProto.FLOAT:
            raise LoweringError(
                f"{where} has {tensor!r} in {_name(self._types[tensor])}; it must be float32 in "
                "every precision.",
                HINT,
            )

    def _wrong(self, node: onnx.NodeProto, tensor: str, low: int) -> LoweringError:
        return LoweringError(
            f"Node {node.name!r} reads {tensor!r} in {_name(self._types[tensor])} in place of "
            f"{_name(low)}.",
            HINT,
        )


def _name(kind: int) -> str:
    return str(TensorProto.DataType.Name(kind)).lower()
