"""Reading a graph that somebody else wrote: everything in it is looked at before it is used.

Let in are the operators of ONNX's default domain that this package can evaluate, on dense
tensors that the file itself holds. Refused, by name, is what could read another file, run code
that is not in sight, differ from one run to the next, or exhaust the memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Set
from dataclasses import dataclass

import onnx
from onnx import AttributeProto, NodeProto, TensorProto, helper

from ccn_deploy.errors import GraphError
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.ops import OPERATORS
from ccn_deploy.graph.wire import WireError, check_message

DOMAINS = ("", "ai.onnx")
"""The two names of ONNX's default domain."""

CONTROL_FLOW = frozenset({"If", "Loop", "Scan", "SequenceMap"})
"""Operators that run graphs of their own."""

RANDOM = frozenset(
    {
        "Bernoulli", "Multinomial", "RandomNormal", "RandomNormalLike", "RandomUniform",
        "RandomUniformLike",
    }
)  # fmt: skip
"""Operators whose result differs from one run to the next."""

_OTHER_TYPES = frozenset(
    {TensorProto.UNDEFINED, TensorProto.STRING, TensorProto.COMPLEX64, TensorProto.COMPLEX128}
)


@dataclass(frozen=True)
class Limits:
    """What a graph may not go beyond.

    Attributes:
        size: Bytes of the file; protobuf itself ends at 2 GiB.
        nodes: Nodes.
        elements: Elements of one constant.
        fields: Fields of all messages of the file together.
        depth: Messages within messages; a graph without subgraphs needs eight.
    """

    size: int = 2**31 - 1
    nodes: int = 50_000
    elements: int = 2**29
    fields: int = 4_000_000
    depth: int = 12


LIMITS = Limits()
"""Room for the largest classifiers there are, not for more."""


def read_graph(data: bytes, name: str = "the graph", limits: Limits = LIMITS) -> Graph:
    """Parse and check a serialised ONNX model.

    Args:
        data: Bytes of the file.
        name: What messages call it.
        limits: What it may not go beyond.

    Raises:
        GraphError: It is no ONNX model, or holds something that is refused; names the node.
    """
    model = parse_model(data, name, limits)
    try:
        _check_model(model, limits)
        onnx.checker.check_model(model)
    except GraphError as error:
        raise GraphError(f"{_capital(name)}: {error.what}", error.hint) from None
    except (onnx.checker.ValidationError, UnicodeDecodeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise GraphError(
            f"{_capital(name)} is no valid ONNX model: {first[:200]}.",
            "Export it again, with a current version of the exporter.",
        ) from error
    return Graph(model)


def _capital(name: str) -> str:
    return "The" + name[3:] if name.startswith("the ") else name


def parse_model(data: bytes, name: str, limits: Limits = LIMITS) -> onnx.ModelProto:
    """Parse a serialised ONNX model within limits, before anything in it is looked at.

    Args:
        data: Bytes of the file.
        name: What messages call it.
        limits: What it may not go beyond.

    Raises:
        GraphError: It is no ONNX model.
    """
    hint = "Give a file that holds an ONNX model with its weights in it."
    if len(data) > limits.size:
        raise GraphError(
            f"{_capital(name)} has {len(data):,} bytes; at most {limits.size:,} are read.", hint
        )
    model = onnx.ModelProto()
    try:
        check_message(data, model.DESCRIPTOR, fields=limits.fields, depth=limits.depth)
        model.ParseFromString(data)
    except WireError as error:
        raise GraphError(f"{_capital(name)} is not read: {error}.", hint) from None
    except Exception as error:  # protobuf's own error, which differs by its implementation
        raise GraphError(
            f"{_capital(name)} is no ONNX model: it cannot be parsed.", hint
        ) from error
    if not model.ir_version or not model.graph.node:
        raise GraphError(f"{_capital(name)} is no ONNX model: it holds no nodes.", hint)
    return model


def _check_model(model: onnx.ModelProto, limits: Limits) -> None:
    graph = model.graph
    versions = sorted({o.version for o in model.opset_import if o.domain in DOMAINS})
    newest = onnx.defs.onnx_opset_version()
    if len(versions) != 1 or not 1 <= versions[0] <= newest:
        raise GraphError(
            f"It uses operator sets {versions} of ONNX; one up to {newest} is read.",
            "Export it for an operator set between 13 and 20.",
        )
    if model.functions:
        raise GraphError(
            f"It has a function of its own, {model.functions[0].name!r}.",
            "Inline its functions: onnx.inliner.inline_local_functions.",
        )
    if model.training_info:
        raise GraphError("It holds a training step.", "Export it for inference.")
    if len(graph.node) > limits.nodes:
        raise GraphError(
            f"It has {len(graph.node):,} nodes; at most {limits.nodes:,} are read.",
            "Deploy a smaller network.",
        )
    if graph.sparse_initializer:
        raise GraphError(
            f"The constant {graph.sparse_initializer[0].values.name!r} is sparse.",
            "Export it with dense weights.",
        )
    for tensor in graph.initializer:
        _check_tensor(tensor, f"The constant {tensor.name!r}", limits)
    for value in (*graph.input, *graph.output):
        _check_type(value)
    off = _false_constants(graph)
    for node in graph.node:
        _check_node(node, limits)
        _check_inference(node, off)
    _check_order(graph)


def _check_type(value: onnx.ValueInfoProto) -> None:
    kind = value.type.WhichOneof("value")
    if kind is not None and kind != "tensor_type":
        raise GraphError(
            f"{value.name!r} is no tensor but a {kind.removesuffix('_type').replace('_', ' ')}.",
            "Export a network that takes and returns tensors.",
        )
    if kind is not None and value.type.tensor_type.elem_type in _OTHER_TYPES:
        raise GraphError(
            f"{value.name!r} holds no real numbers.", "Export a network that takes images."
        )


def _label(node: NodeProto) -> str:
    return f"Node {node.name or (node.output[0] if node.output else '')!r}"


def _check_node(node: NodeProto, limits: Limits) -> None:
    label = _label(node)
    if node.domain not in DOMAINS:
        raise GraphError(
            f"{label} is {node.op_type} of the domain {node.domain!r}, which is not ONNX's own.",
            "Export it without custom operators, and without a runtime's optimisation.",
        )
    if node.op_type in CONTROL_FLOW:
        raise GraphError(
            f"{label} is control flow ({node.op_type}).",
            "Export it with a fixed path, such as by tracing it.",
        )
    if node.op_type in RANDOM:
        raise GraphError(
            f"{label} draws random numbers ({node.op_type}).", "Export it in evaluation mode."
        )
    if node.op_type not in OPERATORS and node.op_type != "Constant":
        raise GraphError(
            f"{label} is {node.op_type}, an operator that is not supported.",
            "docs/operators.md lists those that are.",
        )
    if node.op_type == "Constant" and len(node.attribute) != 1:
        raise GraphError(f"{label} is a constant without one value.", "Export it again.")
    for attribute in node.attribute:
        _check_attribute(attribute, f"{label} ({node.op_type})", limits)


def _check_inference(node: NodeProto, off: Set[str]) -> None:
    """Refuse a node that trains: it draws random numbers, or normalises by the batch at hand.

    Args:
        node: Of an operator that is let in.
        off: Constants that are false.
    """
    if node.op_type == "Dropout" and node.input[2:] not in ([], [""]) and node.input[2] not in off:
        raise GraphError(
            f"{_label(node)} draws random numbers (Dropout in training mode).",
            "Export it in evaluation mode.",
        )
    if node.op_type == "BatchNormalization" and any(
        attribute.name == "training_mode" and attribute.i for attribute in node.attribute
    ):
        raise GraphError(
            f"{_label(node)} normalises by the batch at hand (BatchNormalization in training "
            "mode).",
            "Export it in evaluation mode.",
        )


def _false_constants(graph: onnx.GraphProto) -> frozenset[str]:
    """Return the names of the constants that are one truth value, false."""
    held = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Constant":
            held.update((name, a.t) for name, a in zip(node.output, node.attribute, strict=False))
    return frozenset(
        name
        for name, tensor in held.items()
        if tensor.data_type == TensorProto.BOOL
        and math.prod(tensor.dims) == 1
        and not any(tensor.raw_data)
        and not any(tensor.int32_data)
    )


def _check_attribute(attribute: AttributeProto, label: str, limits: Limits) -> None:
    if attribute.HasField("g") or attribute.graphs:
        raise GraphError(
            f"{label} holds a graph of its own.",
            "Export it without control flow, such as by tracing it.",
        )
    if attribute.HasField("sparse_tensor") or attribute.sparse_tensors:
        raise GraphError(f"{label} holds a sparse tensor.", "Export it with dense weights.")
    if attribute.HasField("tp") or attribute.type_protos:
        raise GraphError(f"{label} holds a type.", "Export it without optional values.")
    if attribute.ref_attr_name:
        raise GraphError(
            f"{label} takes its attribute {attribute.name!r} from a function.",
            "Inline the model's functions: onnx.inliner.inline_local_functions.",
        )
    if not isinstance(attribute.name, str):  # bytes that are no UTF-8 come as they are
        raise GraphError(f"{label} has an attribute whose name is no text.", "Export it again.")
    if attribute.name.startswith("value_string"):
        raise GraphError(f"{label} holds text.", "Export a network that computes with numbers.")
    for tensor in (attribute.t,) if attribute.HasField("t") else attribute.tensors:
        _check_tensor(tensor, label, limits)


def _check_tensor(tensor: TensorProto, label: str, limits: Limits) -> None:
    """Refuse a tensor whose values are not here, or not as many as its shape says."""
    if tensor.data_location == TensorProto.EXTERNAL or tensor.external_data:
        raise GraphError(
            f"{label} has its values in another file (external data).",
            "Save the model with all its weights in one file.",
        )
    if tensor.HasField("segment") or tensor.data_type in _OTHER_TYPES:
        raise GraphError(
            f"{label} holds no numbers that are supported.",
            "Export it with dense tensors of real numbers.",
        )
    if any(size < 0 for size in tensor.dims):
        raise GraphError(f"{label} has the shape {list(tensor.dims)}.", "Export it again.")
    count = math.prod(tensor.dims)
    if count > limits.elements:
        raise GraphError(
            f"{label} has {count:,} elements; at most {limits.elements:,} are read.",
            "Deploy a smaller network.",
        )
    if not _complete(tensor, count):
        raise GraphError(
            f"{label} does not hold the {count:,} elements of its shape {list(tensor.dims)}.",
            "The file is damaged; export it again.",
        )


_FOUR_BITS = frozenset(
    getattr(TensorProto, name)
    for name in ("INT4", "UINT4", "FLOAT4E2M1")
    if hasattr(TensorProto, name)
)


def _complete(tensor: TensorProto, count: int) -> bool:
    packed = tensor.data_type in _FOUR_BITS
    try:
        size = helper.tensor_dtype_to_np_dtype(tensor.data_type).itemsize
        field = helper.tensor_dtype_to_field(tensor.data_type)
    except KeyError:
        return False
    if tensor.HasField("raw_data"):
        return len(tensor.raw_data) == ((count + 1) // 2 if packed else count * size)
    held = len(getattr(tensor, field))
    return held == ((count + 1) // 2 if packed else count) or (packed and held == count)


def _check_order(graph: onnx.GraphProto) -> None:
    """Refuse a tensor that is made twice, or read before it is made."""
    made = {tensor.name for tensor in graph.initializer}
    if len(made) != len(graph.initializer):
        raise GraphError("Two constants have one name.", "Export it again.")
    made.update(value.name for value in graph.input)
    for node in graph.node:
        label = _label(node)
        for name in _named(node.input):
            if name not in made:
                raise GraphError(
                    f"{label} ({node.op_type}) reads {name!r}, which nothing before it makes.",
                    "The nodes must be in order of execution; export it again.",
                )
        for name in _named(node.output):
            if name in made:
                raise GraphError(
                    f"{label} ({node.op_type}) makes {name!r}, which is there already.",
                    "Every tensor must be made once; export it again.",
                )
            made.add(name)
    missing = [value.name for value in graph.output if value.name not in made]
    if missing or not graph.output:
        raise GraphError(f"Nothing makes its output {(missing or [''])[0]!r}.", "Export it again.")


def _named(names: Iterable[str]) -> Iterator[str]:
    return (name for name in names if name)
