"""What must be true of an exported graph before it is written.

The expected ops are written down here a second time, apart from the lowering, so that a slip in
the one is caught by the other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import numpy_helper, shape_inference
from torch import nn

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.lowering import deployed_layers
from ccn_deploy.graph.signature import BATCH, CANDIDATES, COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.layers import BoundedReLU, CompactConv2d, CompactLinear, SubtractMean
from ccn_deploy.models import Classifier

PATTERNS: dict[type[nn.Module], tuple[str, ...]] = {
    SubtractMean: ("y = Sub(x, value)",),
    nn.Conv2d: ("y = Conv(x, weight, bias)",),
    CompactConv2d: (
        "squares = ReduceSumSquare(x, axes)",
        "patches = Conv(squares, ones)",
        "norm = Sqrt(patches)",
        "divisor = Add(norm, delta)",
        "product = Conv(x, weight)",
        "quotient = Div(product, divisor)",
        "y = Add(quotient, bias)",
    ),
    nn.Linear: ("y = Gemm(x, weight, bias)",),
    CompactLinear: (
        "squares = ReduceSumSquare(x, axes)",
        "norm = Sqrt(squares)",
        "divisor = Add(norm, delta)",
        "product = Gemm(x, weight)",
        "quotient = Div(product, divisor)",
        "y = Add(quotient, bias)",
    ),
    nn.ReLU: ("y = Relu(x)",),
    BoundedReLU: ("y = Clip(x, low, high)",),
    nn.MaxPool2d: ("y = MaxPool(x)",),
    nn.Flatten: ("y = Flatten(x)",),
}
"""The exact program of each kind of layer, from its input x to its output y."""

LARGEST = 2**31 - 1
"""Bytes that a protobuf message may have."""

HINT = "Nothing was written; this is a bug in the exporter, please report it."


def check_size(model: Classifier, *, gradient: bool = False) -> None:
    """Refuse a network whose float32 weights do not fit into one ONNX file.

    Args:
        model: The network.
        gradient: Whether the file is that of the input gradients, with every kernel twice.

    Raises:
        LoweringError: They are larger than protobuf's limit of 2 GiB.
    """
    kernels = sum(m.weight.numel() for m in model.modules() if isinstance(m, nn.Conv2d))
    size = 4 * (sum(p.numel() for p in model.parameters()) + (kernels if gradient else 0))
    if size > LARGEST - 2**20:  # a mebibyte for names and nodes
        what = "The gradient graph" if gradient else "The network"
        raise LoweringError(
            f"{what} has {size / 2**30:.1f} GiB of weights; an ONNX file holds at most 2 GiB.",
            "Export without the gradient graph."
            if gradient
            else "Choose a smaller architecture or fewer classes.",
        )


def check_graph(graph: onnx.ModelProto, model: Classifier) -> None:
    """Run every structural check: the ONNX checker, shapes, pattern, no stray text.

    Raises:
        LoweringError: Says which check failed, and where.
    """
    check_valid(graph)
    check_shapes(graph, model)
    check_pattern(graph, model)
    check_plain(graph)


def check_valid(graph: onnx.ModelProto) -> None:
    """Run the ONNX checker in full.

    Raises:
        LoweringError: The checker complains.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        raise LoweringError(f"The ONNX checker refuses the graph: {_line(error)}", HINT) from error


def check_shapes(graph: onnx.ModelProto, model: Classifier) -> None:
    """Infer every shape, strictly, with a symbolic batch.

    Raises:
        LoweringError: A tensor without a known shape, one that does not keep the batch, or
            logits of another shape than [batch, classes].
    """
    shapes = _infer(graph)
    constants = {constant.name for constant in graph.graph.initializer}
    for node in graph.graph.node:
        if constants.issuperset(node.input):  # weights that come off a grid
            continue
        shape = shapes.get(node.output[0], [])
        if not shape or shape[0] != BATCH or 0 in shape:
            raise LoweringError(f"The shape of {node.output[0]!r} is not known: {shape}.", HINT)
    _require_shapes(shapes, {OUTPUT: [BATCH, model.classes]})


def check_gradient_graph(
    graph: onnx.ModelProto, forward: onnx.ModelProto, model: Classifier
) -> None:
    """Run the structural checks of a gradient graph.

    It is valid, says nothing but its function, begins with the very nodes and constants of the
    forward graph, and every shape follows from the symbolic numbers of images and candidates.

    Raises:
        LoweringError: Says which check failed, and where.
    """
    check_valid(graph)
    check_plain(graph)
    nodes, constants = graph.graph.node, {c.name: c for c in graph.graph.initializer}
    for ours, theirs in zip_longest(nodes[: len(forward.graph.node)], forward.graph.node):
        if ours != theirs:
            raise LoweringError(f"The gradient graph computes another {theirs.name!r}.", HINT)
    for constant in forward.graph.initializer:
        if constants.get(constant.name) != constant:
            raise LoweringError(f"The gradient graph has another {constant.name!r}.", HINT)

    shapes = _infer(graph)
    for node in nodes:
        shape = shapes.get(node.output[0], [])
        # Images times candidates, in a tensor that has both in one dimension, has no name.
        if not shape or 0 in shape[1:]:
            raise LoweringError(f"The shape of {node.output[0]!r} is not known: {shape}.", HINT)
    image = model.architecture.input_shape
    wanted: dict[str, list[int | str]] = {
        INPUT: [BATCH, *image],
        COTANGENTS: [BATCH, CANDIDATES, model.classes],
        OUTPUT: [BATCH, model.classes],
        GRADIENTS: [BATCH, CANDIDATES, *image],
    }
    _require_shapes(shapes, wanted)


def check_pattern(graph: onnx.ModelProto, model: Classifier) -> None:
    """Assert the exact program of every layer: its ops, their order, wiring and given constants.

    Raises:
        LoweringError: Names the first layer that is not as it must be, and its first wrong step.
    """
    programs = []
    layers = deployed_layers(model)
    x = INPUT
    for name, layer in layers:
        y = OUTPUT if name == layers[-1][0] else name
        programs.append(Program(name, x, y, PATTERNS[type(layer)], dict(_given(name, layer))))
        x = y
    _check_programs(graph, programs)


@dataclass(frozen=True)
class Program:
    """What a layer must be.

    Attributes:
        layer: Its name, which constants and steps begin with.
        x: Name of the tensor it reads.
        y: Name of the tensor it returns.
        steps: Its ops, as in :data:`PATTERNS`.
        given: Constants that are not learnt, by name.
    """

    layer: str
    x: str
    y: str
    steps: tuple[str, ...]
    given: Mapping[str, NDArray[Any]]


def _check_programs(graph: onnx.ModelProto, programs: Sequence[Program]) -> None:
    nodes = list(graph.graph.node)
    constants = {c.name: c for c in graph.graph.initializer}
    for program in programs:
        name = program.layer
        for step in program.steps:
            found = _step(nodes.pop(0), name, program.x, program.y) if nodes else "nothing"
            if found != step:
                raise LoweringError(f"Layer {name!r} has {found!r} in place of {step!r}.", HINT)
        for what, value in program.given.items():
            if not np.array_equal(numpy_helper.to_array(constants[what]), value):
                raise LoweringError(f"The constant {what!r} has a wrong value.", HINT)
    if nodes:
        spare = " ".join(node.op_type for node in nodes)
        raise LoweringError(f"The graph goes on after its last layer: {spare}.", HINT)


def check_plain(graph: onnx.ModelProto) -> None:
    """Assert that the file says nothing but the function: no doc strings, metadata or paths.

    Raises:
        LoweringError: Something else is in it.
    """
    body = graph.graph
    described = [graph, body, *body.node, *body.input, *body.output, *body.initializer]
    stray = [part for part in described if part.doc_string or part.metadata_props]
    external = [c.name for c in body.initializer if c.external_data]
    if stray or external or body.value_info or graph.functions or graph.producer_version:
        raise LoweringError("The graph carries text beside its function.", HINT)


def _infer(graph: onnx.ModelProto) -> dict[str, list[int | str]]:
    """Return the shape of every tensor: sizes, names of symbolic sizes, 0 where unknown."""
    try:
        inferred = shape_inference.infer_shapes(
            graph, check_type=True, strict_mode=True, data_prop=True
        ).graph
    except shape_inference.InferenceError as error:
        raise LoweringError(f"Shape inference fails: {_line(error)}", HINT) from error
    return {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in [*inferred.input, *inferred.value_info, *inferred.output]
    }


def _require_shapes(
    shapes: dict[str, list[int | str]], wanted: Mapping[str, list[int | str]]
) -> None:
    for name, shape in wanted.items():
        if shapes.get(name) != shape:
            raise LoweringError(f"The {name} have shape {shapes.get(name)}, not {shape}.", HINT)


def _given(name: str, layer: nn.Module) -> Iterator[tuple[str, NDArray[Any]]]:
    """Yield the constants that the paper gives and training does not learn."""
    if isinstance(layer, CompactConv2d):
        yield f"{name}.ones", np.ones((1, 1, *layer.kernel_size), dtype=np.float32)
    if isinstance(layer, CompactConv2d | CompactLinear):
        yield f"{name}.delta", np.array(layer.delta, dtype=np.float32)


def _step(node: onnx.NodeProto, layer: str, x: str, y: str) -> str:
    """Write a node as a step of :data:`PATTERNS`, in names relative to its layer."""

    def relative(tensor: str) -> str:
        return {x: "x", y: "y"}.get(tensor, tensor.removeprefix(f"{layer}."))

    op = f"{node.domain}.{node.op_type}" if node.domain else node.op_type
    outputs = ", ".join(map(relative, node.output))
    return f"{outputs} = {op}({', '.join(map(relative, node.input))})"


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]
