"""What ``torch.onnx`` wrote, as a graph that a person can read and whose bytes do not vary.

Nodes are named as in :mod:`ccn_deploy.graph.builder`: ``layer1.0.conv1`` for the node that gives
that layer's result, ``layer1.0.conv1.<op>`` for others of the same layer, ``layer1.0.add`` for an
operation in the code of ``layer1.0`` itself. A number is added where a name comes again.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Mapping, Sequence

import onnx
from torch import nn

from ccn_deploy.errors import UsageError
from ccn_deploy.exporters.compact_nodes import add_compact_conv, add_compact_linear
from ccn_deploy.exporters.sources.module_layers import DOMAIN, WRAPPED
from ccn_deploy.graph.builder import GraphBuilder, free_name
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import INPUT, OUTPUT

_SCOPES = "pkg.torch.onnx.name_scopes"


def readable_graph(
    traced: onnx.ModelProto,
    network: nn.Module,
    inputs: Mapping[str, Sequence[int | str]],
    outputs: Mapping[str, Sequence[int | str]],
) -> onnx.ModelProto:
    """Return a traced network under readable names, without metadata, compact layers laid out.

    Args:
        traced: From ``torch.onnx``.
        network: The module that was traced.
        inputs: Shape of the one input.
        outputs: Shape of the one output.

    Raises:
        UsageError: The graph calls functions or branches, or its logits depend on no image.
    """
    _refuse(traced)
    rewriting = _Rewriting(traced, network)
    for node, name in zip(traced.graph.node, _node_names(traced.graph, network), strict=True):
        rewriting.add(node, name)
    builder = rewriting.builder
    if OUTPUT not in {output for node in builder.nodes for output in node.output}:
        raise UsageError(
            "The module's logits depend on no image.", "Let it return logits of its images."
        )
    return builder.model(type(network).__name__, inputs, outputs)


def _refuse(traced: onnx.ModelProto) -> None:
    branching = [
        node.op_type
        for node in traced.graph.node
        if any(a.type in (a.GRAPH, a.GRAPHS) for a in node.attribute)
    ]
    if traced.functions or branching:
        what = branching[0] if branching else traced.functions[0].name
        raise UsageError(
            f"The module's graph has control flow or functions of its own ({what}).",
            "Write the module without branches and loops that depend on its input.",
        )


class _Rewriting:
    """Nodes and constants taken over one by one under new names."""

    def __init__(self, traced: onnx.ModelProto, network: nn.Module) -> None:
        graph = traced.graph
        self.network = network
        self.builder = GraphBuilder()
        self.constants = Graph(traced).constants
        self.output = graph.output[0].name
        self.tensors = {graph.input[0].name: INPUT}
        self.taken = {INPUT, OUTPUT}
        # A layer's folded weights have the layer's name; what else holds that parameter moves.
        for node in graph.node:
            if node.domain == DOMAIN:
                self.taken.add(f"{_layer(node)}.weight")
                self.taken.add(f"{_layer(node)}.bias")

    def add(self, node: onnx.NodeProto, name: str) -> None:
        """Take over one node."""
        if node.op_type == "Constant":
            return
        name = self._free(name)
        inputs = [self._tensor(tensor, name) for tensor in node.input]
        outputs = [self._made(tensor, name, at) for at, tensor in enumerate(node.output)]
        if node.domain == DOMAIN:
            self._add_compact(node, name, inputs[0], outputs[0])
            return
        new = onnx.NodeProto(op_type=node.op_type, domain=node.domain, name=name)
        new.input.extend(inputs)
        new.output.extend(outputs)
        for attribute in sorted(node.attribute, key=lambda a: a.name):
            copied = new.attribute.add()
            copied.CopyFrom(attribute)
            copied.ClearField("doc_string")
        self.builder.nodes.append(new)

    def _add_compact(self, node: onnx.NodeProto, name: str, x: str, y: str) -> None:
        layer = self.network.get_submodule(_layer(node))
        if node.op_type == "CompactConv2d":
            add_compact_conv(self.builder, layer, name, x, y)  # type: ignore[arg-type]
            return
        rank = next(a.i for a in node.attribute if a.name == "rank")
        add_compact_linear(self.builder, layer, name, x, y, rank=rank)  # type: ignore[arg-type]

    def _tensor(self, tensor: str, reader: str) -> str:
        """Return the new name of what a node reads, and take a constant over at its first use."""
        if not tensor or tensor in self.tensors:
            return self.tensors.get(tensor, "")
        wrapped = f"{WRAPPED}."
        own = tensor.removeprefix(wrapped) if tensor.startswith(wrapped) else f"{reader}.constant"
        name = self._free(own)
        self.tensors[tensor] = self.builder.constant(name, self.constants[tensor])
        return name

    def _made(self, tensor: str, node: str, at: int) -> str:
        """Return the new name of what a node makes."""
        if not tensor:
            return ""
        name = node if at == 0 else self._free(f"{node}.{at}")
        self.tensors[tensor] = OUTPUT if tensor == self.output else name
        return self.tensors[tensor]

    def _free(self, name: str) -> str:
        """Return a name that nothing has, this one if possible."""
        return free_name(name, self.taken, "_")


def _node_names(graph: onnx.GraphProto, network: nn.Module) -> list[str]:
    """Return a name for every node, which may come again."""
    leaves = {name for name, layer in network.named_modules() if not any(layer.children())}
    paths = [_path(node, graph) for node in graph.node]
    names = []
    for at, (node, path) in enumerate(zip(graph.node, paths, strict=True)):
        last = at + 1 == len(paths) or paths[at + 1] != path
        if path in leaves and path and last:
            names.append(path)
        else:
            op = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", node.op_type).lower()
            names.append(f"{path}.{op}" if path else op)
    return names


def _path(node: onnx.NodeProto, graph: onnx.GraphProto) -> str:
    """Return the name of the layer that a node belongs to; empty for the network itself."""
    if node.domain == DOMAIN:
        return _layer(node)
    weight = node.input[1] if node.op_type == "Conv" else ""
    if weight.startswith(f"{WRAPPED}.") and weight.endswith(".weight"):
        # Batch normalisation that was folded into a convolution has left its own name there.
        return weight.removeprefix(f"{WRAPPED}.").removesuffix(".weight")
    scopes = next((p.value for p in node.metadata_props if p.key == _SCOPES), "[]")
    modules = ast.literal_eval(scopes)[:-1]  # then torch's name of the operation
    inner = modules[-1] if modules else ""
    return inner.removeprefix(f"{WRAPPED}.") if inner.startswith(f"{WRAPPED}.") else ""


def _layer(node: onnx.NodeProto) -> str:
    name: bytes = next(a.s for a in node.attribute if a.name == "layer")
    return name.decode()
