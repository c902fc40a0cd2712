"""An ONNX graph as the rest of the package looks at it: nodes, constants, shapes, layers."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from ccn_deploy.errors import GraphError
from ccn_deploy.graph.signature import BATCH, OUTPUT

if TYPE_CHECKING:
    from ccn_deploy.graph.shapes import Probe

Shape = tuple[int | str, ...]
"""Sizes of a tensor. A string is a size that belongs to the batch: ``"batch"``, or ``"4*batch"``
where a reshape joined another axis to it."""


@dataclass(frozen=True)
class Node:
    """One node of a graph.

    Attributes:
        name: Unique in its graph: the node's own name, or that of its first output where it has
            none or shares it with another node (with the operator behind it, where a node has
            that name).
        op: Operator, such as ``"Conv"``, of ONNX's default domain.
        inputs: Tensors that it reads; ``""`` for an optional one that is absent.
        outputs: Tensors that it makes.
        attributes: By name, as Python values: strings decoded, tensors as arrays.
        proto: The node itself.
    """

    name: str
    op: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    proto: onnx.NodeProto

    def copy(self) -> onnx.NodeProto:
        """Return a copy of the node itself under its unique name, for another graph."""
        copy = onnx.NodeProto()
        copy.CopyFrom(self.proto)
        copy.name = self.name
        return copy


class Graph:
    """A graph that :func:`ccn_deploy.graph.reader.read_graph` let in, or that was built here.

    Nothing changes it: passes make new models.

    Args:
        model: The ONNX model; it is kept, not copied.
    """

    def __init__(self, model: onnx.ModelProto) -> None:
        self.model = model

    @cached_property
    def opset(self) -> int:
        """Version of ONNX's default operator set."""
        imports = self.model.opset_import
        return int(next(o.version for o in imports if o.domain in ("", "ai.onnx")))

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """Names of what the graph is given; files of old formats list constants there too."""
        constants = {constant.name for constant in self.model.graph.initializer}
        return tuple(i.name for i in self.model.graph.input if i.name not in constants)

    @cached_property
    def outputs(self) -> tuple[str, ...]:
        """Names of what the graph returns."""
        return tuple(output.name for output in self.model.graph.output)

    @cached_property
    def nodes(self) -> tuple[Node, ...]:
        """All nodes but those that only hold a constant, in order of execution."""
        counts = Counter(proto.name for proto in self.model.graph.node)

        def name_of(proto: onnx.NodeProto) -> str:
            if proto.name and counts[proto.name] == 1:
                return str(proto.name)
            output = next(name for name in proto.output if name)
            return f"{output} ({proto.op_type})" if counts[output] == 1 else output

        return tuple(
            Node(
                name=name_of(proto),
                op=proto.op_type,
                inputs=tuple(proto.input),
                outputs=tuple(proto.output),
                attributes={a.name: _value(a) for a in proto.attribute},
                proto=proto,
            )
            for proto in self.model.graph.node
            if proto.op_type != "Constant"
        )

    @cached_property
    def constants(self) -> Mapping[str, NDArray[Any]]:
        """Values of initializers and Constant nodes by name."""
        found = {c.name: numpy_helper.to_array(c) for c in self.model.graph.initializer}
        for proto in self.model.graph.node:
            if proto.op_type == "Constant":
                (attribute,) = proto.attribute
                value = _value(attribute)
                kind = np.float32 if attribute.name.startswith("value_float") else None
                found[proto.output[0]] = np.asarray(value, dtype=kind)
        return found

    @cached_property
    def made_by(self) -> Mapping[str, Node]:
        """The node that makes a tensor; inputs and constants are made by none."""
        return {tensor: node for node in self.nodes for tensor in node.outputs if tensor}

    @cached_property
    def readers(self) -> Mapping[str, tuple[Node, ...]]:
        """The nodes that read a tensor, each once, in order; tensors that nobody reads lack."""
        found: dict[str, list[Node]] = {}
        for node in self.nodes:
            for tensor in dict.fromkeys(node.inputs):
                if tensor:
                    found.setdefault(tensor, []).append(node)
        return {tensor: tuple(nodes) for tensor, nodes in found.items()}

    @property
    def shapes(self) -> Mapping[str, Shape]:
        """Shape of every tensor, inputs and constants among them.

        Raises:
            GraphError: The graph does not run on batches of two and three images.
        """
        return self._probe.shapes

    @property
    def fixed(self) -> Mapping[str, NDArray[Any]]:
        """Values of integer and truth tensors that depend neither on images nor on the batch.

        Raises:
            GraphError: As for :attr:`shapes`.
        """
        return self._probe.fixed

    @property
    def floats(self) -> frozenset[str]:
        """Names of the floating-point tensors that depend on the images, which are one of them.

        Raises:
            GraphError: As for :attr:`shapes`.
        """
        return self._probe.floats

    @cached_property
    def input_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images, as the graph declares it.

        Raises:
            GraphError: The first input is no image of a fixed size.
        """
        from ccn_deploy.graph.shapes import input_shapes

        name = self.inputs[0] if self.inputs else "(none)"
        shape = input_shapes(self).get(name, ())
        if len(shape) != 4 or any(isinstance(size, str) for size in shape[1:]):
            raise GraphError(
                f"The input {name!r} of shape {list(shape)} is no batch of images of one size.",
                "A network must take images as [batch, channels, height, width].",
            )
        channels, height, width = (int(size) for size in shape[1:])
        return channels, height, width

    @cached_property
    def classes(self) -> int:
        """Number of logits an image.

        Raises:
            GraphError: The output is no batch of logits; or as for :attr:`shapes`.
        """
        name = OUTPUT if OUTPUT in self.outputs else self.outputs[0]
        shape = self.shapes[name]
        if len(shape) != 2 or shape[0] != BATCH or not isinstance(shape[1], int):
            raise GraphError(
                f"The output {name!r} has shape {list(shape)}, not [batch, classes].",
                "Choose an output that holds one score a class.",
            )
        return shape[1]

    @cached_property
    def _probe(self) -> Probe:
        # Only here: evaluating needs this module.
        from ccn_deploy.graph.shapes import probe

        return probe(self)

    def number(self, tensor: str) -> float | None:
        """Return a constant's value where it is one number; None for any other tensor."""
        value = self.constants.get(tensor)
        return float(value.reshape(-1)[0]) if value is not None and value.size == 1 else None

    def above(self, tensor: str = OUTPUT) -> tuple[Node, ...]:
        """Return the nodes that a tensor depends on, in order of execution."""
        names: set[str] = set()
        ahead = [tensor]
        while ahead:
            node = self.made_by.get(ahead.pop())
            if node is not None and node.name not in names:
                names.add(node.name)
                ahead.extend(node.inputs)
        return tuple(node for node in self.nodes if node.name in names)


def type_name(element_type: int) -> str:
    """Return ``"float16"`` for ``TensorProto.FLOAT16``."""
    return str(onnx.TensorProto.DataType.Name(element_type)).lower()


def _value(attribute: onnx.AttributeProto) -> Any:
    """Return an attribute as a Python value."""
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return numpy_helper.to_array(value)
    if attribute.type == onnx.AttributeProto.STRINGS:
        return [item.decode() for item in value]
    if attribute.type in (onnx.AttributeProto.INTS, onnx.AttributeProto.FLOATS):
        return list(value)
    return value
