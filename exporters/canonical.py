"""The form of a forward graph that other passes start from: the same function, fewer forms.

Foreign files come in old opsets, with shape arithmetic, Identity and Dropout nodes, constants in
nodes and hundreds of comments. The forward graph of a bundle keeps all that, because it is what
its owner deploys; what is derived from it need not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, version_converter

from ccn_deploy.graph.builder import IR_VERSION, OPSET, stored
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.shapes import reached_by_images

Values = dict[str, NDArray[Any]]
Types = dict[str, np.dtype[Any]]

LARGEST = 2**22
"""Numbers that a folded constant may have at most; a larger one is computed where it is needed."""


class CanonicalGraph(Graph):
    """A graph that :func:`canonical` returned, which so has nothing left to do on it."""


def canonical(forward: Graph) -> CanonicalGraph:
    """Return a graph of the same function and the same inputs and outputs, in one form.

    * opset :data:`~ccn_deploy.graph.builder.OPSET` or later, and only ONNX's own;
    * integers that do not depend on the batch are constants, and so are floats computed from
      constants where float32 holds the result exactly; constants are initializers;
    * no Identity, no Dropout, nothing that the outputs do not need;
    * no comments, metadata or recorded shapes.

    In float64 it evaluates to the same numbers. A graph that has this form, as those of
    :func:`ccn_deploy.exporters.lowering.lower`, comes out byte for byte; what this function made
    comes back as it is, so that passes may call one another.
    """
    if isinstance(forward, CanonicalGraph):
        return forward
    model = onnx.ModelProto()
    model.CopyFrom(forward.model)
    _strip(model)
    model = _raised(model)
    for step in (_fold, _fix_reshapes, _bypass, _prune):
        step(model)
    return CanonicalGraph(model)


def _strip(model: onnx.ModelProto) -> None:
    """Clear what has no meaning for the function."""
    graph = model.graph
    for part in (model, graph, *graph.node, *graph.initializer, *graph.input, *graph.output):
        for field in ("doc_string", "metadata_props"):
            if field in part.DESCRIPTOR.fields_by_name:
                part.ClearField(field)
    del graph.value_info[:]
    del graph.quantization_annotation[:]
    constants = {constant.name for constant in graph.initializer}
    _replace(graph.input, [i for i in graph.input if i.name not in constants])
    _replace(model.opset_import, [o for o in model.opset_import if o.domain in ("", "ai.onnx")])


def _raised(model: onnx.ModelProto) -> onnx.ModelProto:
    """Raise the opset; before that the file format, which the converter would stumble over."""
    model.ir_version = max(model.ir_version, IR_VERSION)
    # GroupNormalization changed its meaning on the way to 21; what came before is withdrawn.
    grouped = any(node.op_type == "GroupNormalization" for node in model.graph.node)
    opset = 21 if grouped else OPSET
    if model.opset_import[0].version >= opset:
        return model
    if grouped:
        _widen_groups(model)
    raised = version_converter.convert_version(model, opset)
    _strip(raised)
    return raised


def _widen_groups(model: onnx.ModelProto) -> None:
    """Give GroupNormalization a scale and a shift a channel; before opset 21 it was one a group.

    The converter of ONNX raises the number and leaves the constants.
    """
    graph = Graph(model)
    for node in graph.nodes:
        if node.op != "GroupNormalization":
            continue
        channels, groups = graph.shapes[node.inputs[0]][1], node.attributes["num_groups"]
        for index in (1, 2):
            value = graph.constants.get(node.inputs[index])
            if value is None or not isinstance(channels, int):
                continue
            name = f"{node.outputs[0]}.{('scale', 'shift')[index - 1]}"
            model.graph.initializer.append(stored(name, np.repeat(value, channels // groups)))
            node.proto.input[index] = name


def _fold(model: onnx.ModelProto) -> None:
    """Replace nodes whose outputs are always the same by constants."""
    graph = Graph(model)
    values = dict(graph.constants)
    made_of_nodes = {node.output[0] for node in model.graph.node if node.op_type == "Constant"}
    folded = {name: value for name, value in values.items() if name in made_of_nodes}
    still = _still(graph)
    if still:
        types, module = _types(model), GraphModule(graph, torch.float64)
        for node in still:
            found = _integers(graph, node, types) or _floats(graph, module, node, values)
            if found is not None:
                values.update(found)
                folded.update(found)
    _replace(model.graph.node, [node for node in model.graph.node if node.output[0] not in folded])
    held = {constant.name for constant in model.graph.initializer}
    model.graph.initializer.extend(
        stored(name, value) for name, value in folded.items() if name not in held
    )


def _still(graph: Graph) -> list[Node]:
    """Return the nodes that no pixel can reach: they see constants and sizes alone."""
    reached = reached_by_images(graph)
    return [node for node in graph.nodes if reached.isdisjoint(node.outputs)]


def _types(model: onnx.ModelProto) -> Types:
    """Return the types of the tensors that nodes make, as far as ONNX can infer them."""
    inferred = onnx.shape_inference.infer_shapes(model).graph
    kinds = {v.name: v.type.tensor_type.elem_type for v in inferred.value_info}
    return {name: helper.tensor_dtype_to_np_dtype(kind) for name, kind in kinds.items() if kind}


def _integers(graph: Graph, node: Node, types: Types) -> Values | None:
    """Return a node's outputs if they are integers that are always the same."""
    named = {name: types.get(name) for name in node.outputs if name}
    if any(kind is None or kind.kind not in "iub" for kind in named.values()):
        return None  # the graph is run only if there are integers to be found
    if not all(name in graph.fixed for name in named):
        return None
    return {name: graph.fixed[name].astype(kind) for name, kind in named.items()}


def _floats(graph: Graph, module: GraphModule, node: Node, values: Values) -> Values | None:
    """Return a node's outputs if they are made of constants, and float32 holds them exactly."""
    if any(name in graph.outputs for name in node.outputs):
        return None
    inputs = [name for name in node.inputs if name]
    if not all(name in values for name in inputs):
        return None
    kinds = {values[name].dtype for name in inputs if values[name].dtype.kind == "f"}
    if not kinds <= {np.dtype(np.float32)} or not _stays_float32(node):
        return None
    tensors = [_tensor(values[name]) if name else None for name in node.inputs]
    with torch.no_grad():
        results = module.apply(node, tensors)
    found: Values = {}
    for name, result in zip(node.outputs, results, strict=False):
        value = result.numpy()
        if value.size > LARGEST or value.dtype.kind != "f":
            return None
        found[name] = value.astype(np.float32)
        if not np.array_equal(found[name], value, equal_nan=True):
            return None
    return found


def _stays_float32(node: Node) -> bool:
    return node.op != "CastLike" and node.attributes.get("to", TensorProto.FLOAT) == (
        TensorProto.FLOAT
    )


def _tensor(value: NDArray[Any]) -> torch.Tensor:
    tensor = torch.from_numpy(np.array(value))
    return tensor.double() if tensor.is_floating_point() else tensor


def _fix_reshapes(model: onnx.ModelProto) -> None:
    """Write down the shapes of Reshape nodes in which one size at most depends on the batch."""
    graph = Graph(model)
    for node in graph.nodes:
        if node.op != "Reshape" or node.inputs[1] in graph.constants:
            continue
        shape = graph.shapes[node.outputs[0]]
        sizes = [size if isinstance(size, int) else -1 for size in shape]
        if sizes.count(-1) > 1 or 0 in sizes:
            continue
        name = f"{node.outputs[0]}.shape"
        model.graph.initializer.append(stored(name, np.array(sizes, dtype=np.int64)))
        node.proto.input[1] = name


def _bypass(model: onnx.ModelProto) -> None:
    """Take out nodes that return what they are given."""
    graph = Graph(model)
    outputs = set(graph.outputs)
    renamed: dict[str, str] = {}
    gone: set[str] = set()
    for node in graph.nodes:
        if node.op not in ("Identity", "Dropout") or _mask_is_read(graph, node):
            continue
        source = renamed.get(node.inputs[0], node.inputs[0])
        result = node.outputs[0]
        if result not in outputs:
            renamed[result] = source
        elif source in graph.made_by and source not in outputs:
            # The node that made it takes over the name of the graph's output.
            renamed = {old: result if new == source else new for old, new in renamed.items()}
            renamed[source] = result
        else:
            continue
        gone.add(result)
    _replace(model.graph.node, [node for node in model.graph.node if node.output[0] not in gone])
    _rename(model, lambda name: renamed.get(name, name))


def _mask_is_read(graph: Graph, node: Node) -> bool:
    return any(name in graph.readers or name in graph.outputs for name in node.outputs[1:])


def _rename(model: onnx.ModelProto, new: Callable[[str], str]) -> None:
    for node in model.graph.node:
        for names in (node.input, node.output):
            for index, name in enumerate(names):
                names[index] = new(name)


def _prune(model: onnx.ModelProto) -> None:
    """Drop nodes and constants that no output needs."""
    needed = {output.name for output in model.graph.output}
    kept = []
    for node in reversed(model.graph.node):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            kept.append(node)
    _replace(model.graph.node, kept[::-1])
    _replace(model.graph.initializer, [c for c in model.graph.initializer if c.name in needed])


def _replace(field: object, items: Sequence[object]) -> None:
    """Set a repeated field of a message; leaves it alone if nothing changes."""
    if len(field) == len(items):  # type: ignore[arg-type]
        return
    copies = [type(item)() for item in items]
    for copy, item in zip(copies, items, strict=True):
        copy.CopyFrom(item)  # type: ignore[attr-defined]
    del field[:]  # type: ignore[attr-defined]
    field.extend(copies)  # type: ignore[attr-defined]
