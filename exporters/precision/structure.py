"""What must be true of a converted graph, asserted apart from the conversion.

The conversion decides node by node what to cast. This looks at the types of the tensors that came
of it: it walks from every root up to its squares and down to its division, and knows neither what
the conversion took for an island nor what network it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import onnx
from onnx import TensorProto

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.checks import HINT, check_valid
from ccn_deploy.exporters.precision.formats import GRIDS, HALVES
from ccn_deploy.exporters.precision.islands import kept_nodes
from ccn_deploy.exporters.precision.types import tensor_types
from ccn_deploy.graph.graph import Graph, Node, type_name
from ccn_deploy.graph.signature import COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.graph.structure import PRODUCTS, adds_up

ENDS = ({INPUT, OUTPUT}, {INPUT, OUTPUT, COTANGENTS, GRADIENTS})
"""Inputs and outputs of a forward and of a gradient graph."""

FLOATS = {TensorProto.FLOAT, *(half.onnx for half in HALVES.values())}

ROUNDING = ("Cast", "QuantizeLinear", "DequantizeLinear")

SPREADING = frozenset({"Expand", "Reshape", "Squeeze", "Transpose", "Unsqueeze", *ROUNDING})
"""Ops that a norm passes without being changed, and those that must not be on its way."""

ABOVE_ROOTS = SPREADING | {
    "Add", "AveragePool", "Clip", "GlobalAveragePool", "Max", "ReduceMean", "ReduceSum", "Sub",
}  # fmt: skip
"""Ops between squares and the root of their sum, besides products with constants that add up."""

BELOW_ROOTS = SPREADING | {"Add", "Clip", "Max", "ReduceSum", "Reciprocal", "Where"}
"""Ops between a root, or an exponential, and the division by it."""

ALWAYS_WIDE = frozenset(
    {
        "BatchNormalization", "Exp", "GroupNormalization", "InstanceNormalization", "LRN",
        "LayerNormalization", "Log", "LogSoftmax", "LpNormalization", "RMSNormalization",
        "ReduceL2", "ReduceLogSumExp", "ReduceSumSquare", "Softmax", "Sqrt",
    }
)  # fmt: skip
"""Ops that compute in float32 wherever they are."""

BETWEEN = ("Relu", "MaxPool", "Flatten")
"""Ops that have no business in float32 in a half precision."""


def check_precision(model: onnx.ModelProto, precision: str, keep_fp32: Sequence[str] = ()) -> None:
    """Assert the structural rule of low precision on a converted graph.

    * Inputs and outputs are float32.
    * From every root up to the squares under it and down to the division by it, every tensor is
      float32 and nothing is quantised or cast on the way; so is the mean that is subtracted before
      squaring. Normalisations that are one op, softmax, exponentials and logarithms are float32.
    * All products of the forward pass, and in a half precision activations and pools, have their
      operands in the precision. On a grid those that read the image are float32, products of two
      activations too, and a product that is divided by the norm of what it reads reads the same
      numbers as the norm.
    * In a gradient graph, every float behind the logits is float32.

    Args:
        model: The converted graph, forward or gradient.
        precision: What it was converted to.
        keep_fp32: As given to :func:`~ccn_deploy.exporters.precision.convert`.

    Raises:
        LoweringError: Names the first node that breaks the rule, and how.
    """
    check_valid(model)
    typed = _TypedGraph(Graph(model), keep_fp32)
    typed.check_ends()
    typed.check_wide_ops()
    typed.check_norms()
    if precision in HALVES:
        typed.check_half(HALVES[precision].onnx)
    else:
        typed.check_grid(GRIDS[precision].onnx)
    typed.check_backward()


class _TypedGraph:
    """A graph with the type of every tensor."""

    def __init__(self, graph: Graph, keep_fp32: Sequence[str]) -> None:
        body = graph.model.graph
        self._ends = [end.name for end in (*body.input, *body.output)]
        self._types = tensor_types(graph.model)
        self._graph = graph
        self._forward = {node.name: node for node in graph.above()}
        self._kept = kept_nodes(graph, keep_fp32)
        self._in_norms: set[str] = set()

    def check_ends(self) -> None:
        """Assert that inputs and outputs are the ones that are known, in float32."""
        names = set(self._ends)
        if names not in ENDS:
            raise LoweringError(f"The graph has other ends: {', '.join(sorted(names))}.", HINT)
        for end in self._ends:
            self._require_wide(end, "The graph")

    def check_wide_ops(self) -> None:
        """Assert that the ops that are always float32 are."""
        for node in self._forward.values():
            if node.op in ALWAYS_WIDE or (node.op == "Pow" and self._is_root(node)):
                self._require_wide_node(node)

    def check_norms(self) -> None:
        """Assert that every norm, from its squares to its division, is float32 throughout."""
        for root in self._forward.values():
            if not self._is_root(root) and root.op != "Exp":
                continue
            for path in self._paths_up(root):
                self._require_wide_path(root, path)
                self._check_mean(path[-1])
            for path in self._paths_down(root):
                self._require_wide_path(root, path)

    def check_half(self, low: int) -> None:
        """Assert that what is to compute in a half precision does."""
        below = self._below_products()
        for node in self._candidates((*PRODUCTS, *BETWEEN)):
            if node.op in BETWEEN and node.name not in below:
                continue  # what an image passes before the first product
            for operand in node.inputs[:2] if node.op in PRODUCTS else node.inputs[:1]:
                if self._types[operand] != low:
                    raise self._wrong(node, operand, low)

    def check_grid(self, low: int) -> None:
        """Assert that both operands of every product but the first come off a grid."""
        below = self._below_products()
        for node in self._candidates(PRODUCTS):
            wanted = self._is_weighted(node) and node.name in below
            for operand in node.inputs[:2]:
                made_by = self._graph.made_by.get(operand)
                on_grid = made_by is not None and made_by.op == "DequantizeLinear"
                if on_grid and made_by and self._types[made_by.inputs[0]] != low:
                    raise self._wrong(node, made_by.inputs[0], low)
                if on_grid != wanted:
                    what = "a quantised" if on_grid else "an unquantised"
                    raise LoweringError(f"Node {node.name!r} reads {what} {operand!r}.", HINT)

    def check_backward(self) -> None:
        """Assert that every float behind the logits is float32."""
        for node in self._graph.nodes:
            if node.name not in self._forward:
                for tensor in node.outputs:
                    if self._types.get(tensor) in FLOATS:
                        self._require_wide(tensor, f"Node {node.name!r}")

    def _paths_up(self, root: Node) -> Iterator[tuple[Node, ...]]:
        """Yield the nodes from a root's operand up to each square under it."""
        if root.op in ("ReduceL2", "Exp"):
            return
        ahead: list[tuple[str, tuple[Node, ...]]] = [(root.inputs[0], ())]
        seen = set()
        while ahead:
            tensor, path = ahead.pop()
            node = self._graph.made_by.get(tensor)
            if node is None or node.name in seen:
                continue
            seen.add(node.name)
            if self._is_square(node):
                yield (*path, node)
            elif node.op in ABOVE_ROOTS or adds_up(self._graph, node):
                ahead += [(tensor, (*path, node)) for tensor in node.inputs if tensor]

    def _paths_down(self, root: Node) -> Iterator[tuple[Node, ...]]:
        """Yield the nodes from a root's result down to each division by it."""
        inverted = root.op == "Pow" and self._power(root) < 0
        ahead: list[tuple[str, tuple[Node, ...], bool]] = [(root.outputs[0], (), inverted)]
        seen = set()
        while ahead:
            tensor, path, inverted = ahead.pop()
            for node in self._graph.readers.get(tensor, ()):
                if (node.name, tensor) in seen or node.name not in self._forward:
                    continue
                seen.add((node.name, tensor))
                if (node.op == "Div" and node.inputs[1] == tensor) or (
                    node.op == "Mul" and inverted
                ):
                    yield (*path, node)
                elif node.op in BELOW_ROOTS:
                    turned = inverted or node.op == "Reciprocal"
                    ahead.append((node.outputs[0], (*path, node), turned))

    def _require_wide_path(self, root: Node, path: Sequence[Node]) -> None:
        """Assert that a norm's path is float32, and that nothing on it rounds."""
        self._in_norms.update(node.name for node in path)
        for node in path:
            if node.op in ROUNDING:
                raise self._rounds(node, f"what {root.name!r} is the root of or leads to")
            self._require_wide_node(node)
        if path[-1].op == "Div":
            self._check_same_numbers(root, path[-1])

    def _check_mean(self, square: Node) -> None:
        """Assert that a mean that is squared, or subtracted before, is float32.

        Unless a product reads the rounded mean too: then it is what a compact layer multiplies,
        and :meth:`_check_same_numbers` says what its norm reads.
        """
        node = self._graph.made_by.get(square.inputs[0])
        operand = square.inputs[0]
        if node is not None and node.op == "Sub":
            self._require_wide_node(node)
            operand = node.inputs[1]
        mean = self._graph.made_by.get(self._unrounded(operand))
        if mean is not None and mean.op in ("ReduceMean", "GlobalAveragePool"):
            self._require_wide_node(mean)
            readers = self._graph.readers.get(operand, ())
            multiplied = any(n.op in PRODUCTS and n.inputs[0] == operand for n in readers)
            if operand not in mean.outputs and not multiplied:
                raise self._rounds(
                    self._graph.made_by[operand], f"the mean that {square.name!r} needs"
                )

    def _check_same_numbers(self, root: Node, division: Node) -> None:
        """Assert that a norm is taken of what is multiplied, not of what it was rounded from."""
        product = self._graph.made_by.get(division.inputs[0])
        if product is None or product.op not in PRODUCTS:
            return
        grid = self._graph.made_by.get(product.inputs[0])
        if grid is None or grid.op != "DequantizeLinear":
            return
        unrounded = self._unrounded(product.inputs[0])
        squares = [path[-1] for path in self._paths_up(root)]
        if root.op == "ReduceL2":
            squares.append(root)
        if any(unrounded in square.inputs for square in squares):
            raise LoweringError(
                f"Node {root.name!r} is the norm of {unrounded!r}, but {product.name!r} multiplies "
                "what that was rounded to.",
                HINT,
            )

    def _below_products(self) -> frozenset[str]:
        """Return the names of the forward nodes that a product with weights is above of."""
        behind: set[str] = set()
        found = set()
        for node in self._forward.values():
            below = any(tensor in behind for tensor in node.inputs)
            if below:
                found.add(node.name)
            if below or (self._is_weighted(node) and node.name not in self._in_norms):
                behind.update(node.outputs)
        return frozenset(found)

    def _candidates(self, ops: tuple[str, ...]) -> Iterator[Node]:
        """Yield the forward nodes of some ops, without those of norms and those kept."""
        for node in self._forward.values():
            if node.op in ops and node.name not in self._in_norms | self._kept:
                yield node

    def _is_weighted(self, node: Node) -> bool:
        """Whether a node multiplies activations with one matrix or kernel."""
        if node.op not in PRODUCTS or node.attributes.get("transA", 0):
            return False
        weight = node.inputs[1]
        made_by = self._graph.made_by.get(weight)
        if made_by is not None and made_by.op == "DequantizeLinear":
            weight = made_by.inputs[0]
        constant = self._graph.constants.get(weight)
        is_alone = node.inputs[0] in self._graph.constants
        return constant is not None and not is_alone and (node.op == "Conv" or constant.ndim == 2)

    def _is_root(self, node: Node) -> bool:
        if node.op in ("Sqrt", "ReduceL2"):
            return True
        return node.op == "Pow" and (self._power(node) < 0 or self._power(node) % 1 != 0)

    def _is_square(self, node: Node) -> bool:
        if node.op == "Mul":
            return self._unrounded(node.inputs[0]) == self._unrounded(node.inputs[1])
        return node.op == "ReduceSumSquare" or (node.op == "Pow" and self._power(node) == 2)

    def _unrounded(self, tensor: str) -> str:
        """Return what a tensor was before it was cast or put on a grid."""
        made_by = self._graph.made_by.get(tensor)
        while made_by is not None and made_by.op in ROUNDING:
            tensor = made_by.inputs[0]
            made_by = self._graph.made_by.get(tensor)
        return tensor

    def _power(self, node: Node) -> float:
        """Return a Pow's exponent; that of a root where it is not known."""
        exponent = self._graph.number(node.inputs[1])
        return 0.5 if exponent is None else exponent

    def _require_wide_node(self, node: Node) -> None:
        for tensor in (*node.inputs, *node.outputs):
            if self._types.get(tensor) in FLOATS:
                self._require_wide(tensor, f"Node {node.name!r}")

    def _require_wide(self, tensor: str, where: str) -> None:
        if self._types[tensor] != TensorProto.FLOAT:
            kind = type_name(self._types[tensor])
            raise LoweringError(
                f"{where} has {tensor!r} in {kind}; it must be float32 in every precision.", HINT
            )

    def _rounds(self, node: Node, what: str) -> LoweringError:
        return LoweringError(
            f"Node {node.name!r} rounds {what}; it must be float32 in every precision.", HINT
        )

    def _wrong(self, node: Node, tensor: str, low: int) -> LoweringError:
        return LoweringError(
            f"Node {node.name!r} reads {tensor!r} in {type_name(self._types[tensor])} in place of "
            f"{type_name(low)}.",
            HINT,
        )
