"""A small builder of ONNX graphs in which every name says which layer it belongs to.

Nodes are named ``<layer>`` or ``<layer>.<part>``, and a node's output has the node's name. The
node named ``<layer>`` gives that layer's result, so the tensor ``conv1`` is what the layer
``conv1`` returns; only the last layer's result is called ``logits``. Constants are
``<layer>.<what>``. The graph holds no paths, times or class names: equal networks give equal bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from ccn_deploy.graph.graph import Graph

OPSET = 20
"""Read by ONNX Runtime, TensorRT and ``onnx.reference``; ReduceSumSquare takes its axes as an
input from 18 on."""

IR_VERSION = 9
"""The file format that came with opset 20; every supported ONNX Runtime reads it."""


class GraphBuilder:
    """Collects nodes and constants in order of execution."""

    def __init__(self) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, TensorProto] = {}

    def constant(self, name: str, value: NDArray[Any] | np.generic) -> str:
        """Add a constant and return its name. The dtype is that of ``value``."""
        assert name not in self.constants, name
        self.constants[name] = stored(name, value)
        return name

    def node(
        self,
        op: str,
        inputs: Sequence[str],
        name: str,
        *,
        output: str = "",
        **attributes: Any,
    ) -> str:
        """Add a node and return the name of its output, which is ``name`` unless given."""
        output = output or name
        self.nodes.append(helper.make_node(op, list(inputs), [output], name=name, **attributes))
        return output

    def model(
        self,
        name: str,
        inputs: Mapping[str, Sequence[int | str]],
        outputs: Mapping[str, Sequence[int | str]],
        *,
        opset: int = OPSET,
        ir_version: int = IR_VERSION,
    ) -> onnx.ModelProto:
        """Return the whole graph, given the shapes of its float32 inputs and outputs."""
        constants = list(self.constants.values())
        graph = helper.make_graph(self.nodes, name, floats(inputs), floats(outputs), constants)
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", opset)],
            ir_version=ir_version,
            producer_name="ccn-deploy",
        )

    def model_like(self, graph: Graph, *, opset: int = 0, ir_version: int = 0) -> onnx.ModelProto:
        """Return a graph with the inputs and outputs of another.

        Its constants are those made here and, of the other graph's, those that nodes read and
        that have no namesake here.

        Args:
            graph: The other one.
            opset: At least; never lower than the other graph's.
            ir_version: Of the file format, as for ``opset``.
        """
        read = {tensor for node in self.nodes for tensor in node.input}
        kept = [
            stored(name, value)
            for name, value in graph.constants.items()
            if name in read and name not in self.constants
        ]
        model, body = graph.model, graph.model.graph
        constants = [*kept, *self.constants.values()]
        return helper.make_model(
            helper.make_graph(self.nodes, body.name, body.input, body.output, constants),
            opset_imports=[helper.make_opsetid("", max(opset, graph.opset))],
            ir_version=max(ir_version, model.ir_version),
            producer_name=model.producer_name,
        )


def floats(shapes: Mapping[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
    """Return float32 inputs or outputs of a graph, by name and shape."""
    return [
        helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape)
        for tensor, shape in shapes.items()
    ]


def stored(name: str, value: NDArray[Any] | np.generic) -> TensorProto:
    """Return a constant as a file holds it: rows last."""
    return numpy_helper.from_array(np.asarray(value, order="C"), name)


def free_name(name: str, taken: set[str], joint: str = ".") -> str:
    """Return a name that is not taken, this one if possible, else with a number; and take it."""
    free, number = name, 1
    while free in taken:
        number += 1
        free = f"{name}{joint}{number}"
    taken.add(free)
    return free


def to_bytes(graph: onnx.ModelProto) -> bytes:
    """Serialise so that equal graphs give equal bytes."""
    data: bytes = graph.SerializeToString(deterministic=True)
    return data
