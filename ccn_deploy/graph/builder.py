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
        self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
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
    ) -> onnx.ModelProto:
        """Return the whole graph, given the shapes of its float32 inputs and outputs."""

        def floats(shapes: Mapping[str, Sequence[int | str]]) -> list[onnx.ValueInfoProto]:
            return [
                helper.make_tensor_value_info(tensor, TensorProto.FLOAT, shape)
                for tensor, shape in shapes.items()
            ]

        graph = helper.make_graph(
            self.nodes,
            name,
            inputs=floats(inputs),
            outputs=floats(outputs),
            initializer=list(self.constants.values()),
        )
        return helper.make_model(
            graph,
            opset_imports=[helper.make_opsetid("", OPSET)],
            ir_version=IR_VERSION,
            producer_name="ccn-deploy",
        )


def to_bytes(graph: onnx.ModelProto) -> bytes:
    """Serialise so that equal graphs give equal bytes."""
    data: bytes = graph.SerializeToString(deterministic=True)
    return data
