"""What of a foreign ONNX file is kept: the nodes between one input and the logits."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import onnx
from onnx import TensorProto, helper

from ccn_deploy.errors import UsageError

OLDEST_OPSET = 7
"""The first in which arithmetic broadcasts by itself; older nodes cannot stand beside ours."""

IR_VERSION = 8
"""What a file's format is raised to: older ones list their constants among the inputs."""

HEAD = ("Softmax", "LogSoftmax", "Identity", "Cast", "Dropout")
"""Operators that are taken away where they stand last: the contract is logits."""

_FLOATS = {TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.DOUBLE, TensorProto.BFLOAT16}


@dataclass(frozen=True)
class Removed:
    """A node that was taken away from the end.

    Attributes:
        op: One of :data:`HEAD`.
        axis: That a softmax normalises, as the file says; None for other operators.
    """

    op: str
    axis: int | None = None

    def __str__(self) -> str:
        return self.op if self.axis is None else f"{self.op} over axis {self.axis}"


@dataclass(frozen=True)
class Cut:
    """What is kept of a file.

    Attributes:
        model: The nodes that the logits depend on, unchanged and in their order, with the constants
            that they read; one input, one output without a shape.
        input: The value that is fed.
        output: Tensor with the logits.
        source_output: The file's own output that it was found above.
        removed: What stood between the two, in order of execution.
    """

    model: onnx.ModelProto
    input: onnx.ValueInfoProto
    output: str
    source_output: str
    removed: tuple[Removed, ...]


def cut(model: onnx.ModelProto, input_name: str = "", output_name: str = "") -> Cut:
    """Keep what the logits need.

    Args:
        model: The file; it is not changed.
        input_name: Of the input with the images; the only one that is needed if empty.
        output_name: Of the output; the first one if empty.

    Raises:
        UsageError: Too old an opset, no such input or output, or other inputs that are needed too.
    """
    opset = _opset(model)
    graph = model.graph
    source_output = _choose_output(graph, output_name)
    makers = {tensor: node for node in graph.node for tensor in node.output if tensor}
    output, removed = _strip_head(makers, source_output, opset)
    nodes = needed(graph.node, [output])
    read = {tensor for node in nodes for tensor in node.input}
    image = _choose_input(graph, read, input_name)
    kept = helper.make_graph(
        [_bare(node) for node in nodes],
        "forward",
        inputs=[image],
        outputs=[helper.make_tensor_value_info(output, TensorProto.FLOAT, [])],
        initializer=[_bare(c) for c in graph.initializer if c.name in read | {output}],
        sparse_initializer=list(graph.sparse_initializer),
    )
    made = helper.make_model(
        kept,
        opset_imports=_imports(model, nodes, opset),
        functions=_functions(model, nodes),
        ir_version=max(model.ir_version, IR_VERSION),
        producer_name="ccn-deploy",
    )
    return Cut(made, image, output, source_output, removed)


def needed(nodes: Sequence[onnx.NodeProto], outputs: Iterable[str]) -> list[onnx.NodeProto]:
    """Return the nodes that some tensors depend on, in their order."""
    makers = {tensor: i for i, node in enumerate(nodes) for tensor in node.output if tensor}
    found: set[int] = set()
    ahead = list(outputs)
    while ahead:
        index = makers.get(ahead.pop())
        if index is not None and index not in found:
            found.add(index)
            ahead.extend(_reads(nodes[index]))
    return [nodes[index] for index in sorted(found)]


def _reads(node: onnx.NodeProto) -> list[str]:
    """Return what a node reads, its subgraphs included: the reader refuses those by name."""
    reads = list(node.input)
    for attribute in node.attribute:
        for inner in [attribute.g, *attribute.graphs]:
            reads.extend(tensor for other in inner.node for tensor in other.input)
    return reads


def _bare(proto: onnx.NodeProto | onnx.TensorProto) -> onnx.NodeProto | onnx.TensorProto:
    """Return a node or a constant without remarks: those hold paths and stack traces."""
    made = type(proto)()
    made.CopyFrom(proto)
    made.ClearField("doc_string")
    made.ClearField("metadata_props")
    return made


def _opset(model: onnx.ModelProto) -> int:
    versions = [entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")]
    opset = max(versions, default=0)
    if opset < OLDEST_OPSET:
        raise UsageError(
            f"The file is of opset {opset or 'none'}; the oldest that is taken in is "
            f"{OLDEST_OPSET}.",
            "Raise it with onnx.version_converter.convert_version(model, 13), and export that.",
        )
    return int(opset)


def _imports(
    model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto], opset: int
) -> list[onnx.OperatorSetIdProto]:
    """Return the default operators' version, and other domains only where a node is of one."""
    used = {node.domain for node in nodes} - {"", "ai.onnx"}
    others = [entry for entry in model.opset_import if entry.domain in used]
    return [helper.make_opsetid("", opset), *others]


def _functions(model: onnx.ModelProto, nodes: Sequence[onnx.NodeProto]) -> list[onnx.FunctionProto]:
    """Return the functions if a node calls one: the reader refuses them by name."""
    called = {(node.domain, node.op_type) for node in nodes}
    calls = any((function.domain, function.name) in called for function in model.functions)
    return list(model.functions) if calls else []


def _choose_output(graph: onnx.GraphProto, name: str) -> str:
    names = [output.name for output in graph.output]
    if not names:
        raise UsageError("The file has no output.", "Export the network again.")
    if name and name not in names:
        raise UsageError(
            f"The file has no output {name!r}.", f"--output-name takes one of: {listed(names)}."
        )
    return name or names[0]


def _choose_input(graph: onnx.GraphProto, read: set[str], name: str) -> onnx.ValueInfoProto:
    """Return the input with the images; files of old formats list constants there too."""
    constants = {constant.name for constant in graph.initializer}
    fed = [value for value in graph.input if value.name not in constants and value.name in read]
    names = [value.name for value in fed]
    if not fed:
        raise UsageError(
            "The output depends on no input of the file.", "Name another with --output-name."
        )
    if name and name not in names:
        raise UsageError(
            f"The output depends on no input {name!r}.", f"It depends on: {listed(names)}."
        )
    if len(fed) > 1:
        raise UsageError(
            f"The network takes {len(fed)} inputs: {listed(names)}. One is fed, the images.",
            "Give the others a constant value: add an initializer of the same name to the file.",
        )
    image: onnx.ValueInfoProto = fed[0]
    return image


def _strip_head(
    makers: dict[str, onnx.NodeProto], output: str, opset: int
) -> tuple[str, tuple[Removed, ...]]:
    """Go up from an output past what only normalises or renames it."""
    removed: list[Removed] = []
    while (node := makers.get(output)) is not None and _is_head(node):
        axis = None
        if "Softmax" in node.op_type:
            default = -1 if opset >= 13 else 1
            axis = next((int(a.i) for a in node.attribute if a.name == "axis"), default)
        removed.append(Removed(node.op_type, axis))
        output = node.input[0]
    return output, tuple(reversed(removed))


def _is_head(node: onnx.NodeProto) -> bool:
    if node.domain not in ("", "ai.onnx") or node.op_type not in HEAD or not node.input:
        return False
    if node.op_type == "Cast":
        return any(a.name == "to" and a.i in _FLOATS for a in node.attribute)
    # A third input of Dropout may switch it on.
    return node.op_type != "Dropout" or not any(node.input[2:])


def listed(names: Sequence[str]) -> str:
    """Return the first names, for a sentence; a foreign file's may be of any length and number."""
    plain = (" ".join(name.split()) for name in names[:8])
    shown = [name if len(name) <= 80 else f"{name[:77]}..." for name in plain]
    return ", ".join(shown) + (", ..." if len(names) > 8 else "")
