"""What must be true of a converted graph, asserted apart from the conversion.

The conversion decides node by node what to cast. This looks at the types of the tensors that came
of it: it walks from every root to the sum of squares above it and the division below it.
"""

from __future__ import annotations

import onnx
from onnx import TensorProto, shape_inference

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.checks import check_plain, check_valid
from ccn_deploy.exporters.graph import COTANGENTS, INPUT, OUTPUT
from ccn_deploy.exporters.graph import GRADIENTS as SLOPES
from ccn_deploy.exporters.lowering import deployed_layers
from ccn_deploy.exporters.precision.formats import GRIDS, HALVES
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier

HINT = "Nothing was written; this is a bug in the exporter, please report it."

_FLOATS = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)


def check_precision(graph: onnx.ModelProto, precision: str, model: Classifier) -> None:
    """Assert the structural rule of low precision on a converted graph.

    * Inputs and outputs are float32.
    * Every compact layer has its root, and every tensor from the operand of the sum of squares to
      the quotient is float32; nothing is quantised or cast on the way.
    * Every other convolution and matrix product of the forward pass has both operands in the
      precision, and in a half precision so have the activations and pools between them.
    * In a gradient graph, every float behind the logits is float32.

    Raises:
        LoweringError: Names the first layer that breaks the rule, and how.
    """
    check_valid(graph)
    check_plain(graph)
    typed = _Typed(graph, precision)
    typed.check_ends()
    for name, layer in deployed_layers(model):
        if isinstance(layer, CompactConv2d | CompactLinear):
            typed.check_norm(name, convolution=isinstance(layer, CompactConv2d))
    typed.check_products()
    typed.check_backward()


class _Typed:
    """A graph with the type of every tensor."""

    def __init__(self, graph: onnx.ModelProto, precision: str) -> None:
        self._precision = precision
        inferred = shape_inference.infer_shapes(graph, check_type=True, strict_mode=True).graph
        ends = [*inferred.input, *inferred.value_info, *inferred.output]
        self._ends = [*inferred.input, *inferred.output]
        self._types: dict[str, int] = {e.name: e.type.tensor_type.elem_type for e in ends}
        self._types |= {c.name: c.data_type for c in graph.graph.initializer}
        self._nodes = list(graph.graph.node)
        self._made_by = {tensor: node for node in self._nodes for tensor in node.output}
        self._forward = self._above(OUTPUT)

    def check_ends(self) -> None:
        """Assert that inputs and outputs are float32 and the ones that are known."""
        names = {end.name for end in self._ends}
        if names not in ({INPUT, OUTPUT}, {INPUT, OUTPUT, COTANGENTS, SLOPES}):
            raise LoweringError(f"The graph has other ends: {', '.join(sorted(names))}.", HINT)
        for end in self._ends:
            self._require_wide(end.name, "graph")

    def check_norm(self, layer: str, *, convolution: bool) -> None:
        """Assert that the branch of a layer is whole and float32 throughout."""
        roots = [n for n in self._nodes if n.op_type == "Sqrt" and n.name == f"{layer}.norm"]
        if len(roots) != 1:
            raise LoweringError(f"Layer {layer!r} has {len(roots)} norms in place of one.", HINT)
        node, found = roots[0], []
        while node.op_type != "ReduceSumSquare":
            node = self._made_by.get(node.input[0], onnx.NodeProto())
            found.append(node.op_type)
            self._require_node(node, layer)
        wanted = ["Conv", "ReduceSumSquare"] if convolution else ["ReduceSumSquare"]
        if found != wanted:
            raise LoweringError(
                f"Layer {layer!r} has {' '.join(found)} above its root, not {' '.join(wanted)}.",
                HINT,
            )
        below = roots[0]
        for op in ("Add", "Div"):
            self._require_node(below, layer)
            readers = [n for n in self._nodes if below.output[0] in n.input]
            readers = [n for n in readers if n.name in self._forward]
            if [n.op_type for n in readers] != [op]:
                ops = " ".join(n.op_type for n in readers) or "nothing"
                raise LoweringError(
                    f"Layer {layer!r} has {ops} below {below.name!r} in place of {op}.", HINT
                )
            below = readers[0]
        self._require_node(below, layer)

    def check_products(self) -> None:
        """Assert that what is to compute in the precision does."""
        branches = {
            node.name
            for root in self._nodes
            if root.op_type == "Sqrt"
            for node in (self._made_by.get(root.input[0]),)
            if node is not None
        }
        low_ops = {"Conv", "Gemm"}
        if self._precision in HALVES:
            low_ops |= {"Relu", "Clip", "MaxPool"}
        for node in self._nodes:
            if node.name in branches or node.name not in self._forward:
                continue
            if node.op_type in low_ops:
                operands = node.input[:2] if node.op_type in ("Conv", "Gemm") else node.input[:1]
                for operand in operands:
                    if not self._is_low(operand):
                        raise LoweringError(
                            f"Node {node.name!r} reads {operand!r} in "
                            f"{TensorProto.DataType.Name(self._types[operand])}, "
                            f"not in {self._precision}.",
                            HINT,
                        )

    def check_backward(self) -> None:
        """Assert that every float behind the logits is float32."""
        for node in self._nodes:
            if node.name not in self._forward:
                for tensor in node.output:
                    if self._types[tensor] in _FLOATS:
                        self._require_wide(tensor, node.name)

    def _is_low(self, tensor: str) -> bool:
        if self._precision in HALVES:
            return self._types[tensor] == HALVES[self._precision].onnx
        node = self._made_by.get(tensor)
        if node is None or node.op_type != "DequantizeLinear":
            return False
        return bool(self._types[node.input[0]] == GRIDS[self._precision].onnx)

    def _require_node(self, node: onnx.NodeProto, layer: str) -> None:
        for tensor in (*node.input, *node.output):
            if self._types[tensor] != TensorProto.INT64:  # axes
                self._require_wide(tensor, layer)

    def _require_wide(self, tensor: str, where: str) -> None:
        if self._types[tensor] != TensorProto.FLOAT:
            found = TensorProto.DataType.Name(self._types[tensor])
            raise LoweringError(
                f"Layer {where!r}: {tensor!r} is {found} and must be float32 in every precision.",
                HINT,
            )

    def _above(self, tensor: str) -> set[str]:
        found: set[str] = set()
        ahead = [tensor]
        while ahead:
            node = self._made_by.get(ahead.pop())
            if node is not None and node.name not in found:
                found.add(node.name)
                ahead.extend(node.input)
        return found
