"""Around a foreign network: from images in [0, 1] to what it takes, from what it returns to logits.

``images`` goes through at most a Gather (channel order), Mul (range), Sub (mean), Div (deviation),
Transpose (layout) and Cast (half or double precision) to the network's own input; its result is
called ``logits`` by an Identity, Flatten or Cast where it is not that already. Nothing is folded
into weights: a mean folded into a convolution that pads with zeros would change the border.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ccn_deploy.bundle.preprocessing import Preprocessing
from ccn_deploy.exporters.sources.onnx_cut import Cut
from ccn_deploy.graph.builder import GraphBuilder, floats, free_name
from ccn_deploy.graph.signature import BATCH, INPUT, OUTPUT

LAYER = "preprocessing"
"""Name of the last node that makes the network's own input; the others are its parts."""


@dataclass(frozen=True)
class Format:
    """What a foreign network takes and returns.

    Attributes:
        preprocessing: Of its input.
        image_shape: (channels, height, width) of an image, whatever the layout.
        input_type: Element type of its input, as in ``onnx.TensorProto``.
        output_type: Element type of the tensor with the logits.
        output_rank: Axes of that tensor; those behind the second have size 1.
        classes: Logits.
    """

    preprocessing: Preprocessing
    image_shape: tuple[int, int, int]
    input_type: int
    output_type: int
    output_rank: int
    classes: int


def take_in(kept: Cut, form: Format) -> tuple[onnx.ModelProto, tuple[str, ...]]:
    """Return the forward graph of a foreign network.

    Args:
        kept: The network, unchanged.
        form: What it takes and returns.

    Returns:
        The model, and a sentence for each change of a name in the foreign nodes.
    """
    model = onnx.ModelProto()
    model.CopyFrom(kept.model)
    graph = model.graph
    pieces = _Pieces(names_of(model))
    before, after = _steps(form), _tail(form)
    source, output = kept.input.name, kept.output
    before = before or ([("Identity", {}, None)] if source != INPUT else [])
    after = after or ([("Identity", {})] if output != OUTPUT else [])
    renamed = []
    for name, stays in ((INPUT, not before), (OUTPUT, not after)):
        if name in pieces.taken and not stays:
            new = pieces.free(f"{name}.source")
            _rename(graph, name, new)
            source, output = (new if tensor == name else tensor for tensor in (source, output))
            renamed.append(f"The file's tensor {name!r} is called {new!r}.")
    pieces.lead_in(before, source)
    nodes = [*pieces.builder.nodes, *graph.node, *pieces.lead_out(after, output)]
    del graph.node[:]
    graph.node.extend(nodes)
    graph.initializer.extend(pieces.builder.constants.values())
    _set_signature(graph, form)
    return model, tuple(renamed)


def names_of(model: onnx.ModelProto) -> set[str]:
    """Return every name of a tensor or node of a model."""
    graph = model.graph
    found = {constant.name for constant in graph.initializer}
    found.update(value.name for value in graph.input)
    for node in graph.node:
        found.update((node.name, *node.input, *node.output))
    return found


Step = tuple[str, dict[str, Any], "NDArray[Any] | None"]
"""An operator, its attributes, and its constant second input."""


def _steps(form: Format) -> list[Step]:
    """Return the operators between the images and the network's own input."""
    done = form.preprocessing
    low, high = done.range
    mean = np.array(done.mean or [0.0]) - low
    std = np.array(done.std or [1.0])
    steps: list[Step] = []
    if done.channel_order == "bgr":
        steps.append(("Gather", {"axis": 1}, np.array([2, 1, 0])))
    if high - low != 1:
        steps.append(("Mul", {}, np.array(high - low, np.float32)))
    if mean.any():
        steps.append(("Sub", {}, _by_channel(mean)))
    if (std != 1).any():
        steps.append(("Div", {}, _by_channel(std)))
    if done.layout == "nhwc":
        steps.append(("Transpose", {"perm": [0, 2, 3, 1]}, None))
    if not _is_float(form.input_type):
        steps.append(("Cast", {"to": form.input_type}, None))
    return steps


def _tail(form: Format) -> list[tuple[str, dict[str, Any]]]:
    """Return the operators that make float32 [batch, classes] of the network's result."""
    tail: list[tuple[str, dict[str, Any]]] = []
    if form.output_rank != 2:
        tail.append(("Flatten", {"axis": 1}))
    if not _is_float(form.output_type):
        tail.append(("Cast", {"to": TensorProto.FLOAT}))
    return tail


def _by_channel(values: NDArray[np.float64]) -> NDArray[np.float32]:
    return values.astype(np.float32).reshape(1, -1, 1, 1)


def _is_float(element_type: int) -> bool:
    return element_type == TensorProto.FLOAT


@dataclass
class _Pieces:
    """Nodes and constants that are added, under names that are free."""

    taken: set[str]
    builder: GraphBuilder = field(default_factory=GraphBuilder)

    def free(self, name: str) -> str:
        """Return a name that nothing has, and take it."""
        return free_name(name, self.taken, "-")

    def lead_in(self, steps: Sequence[Step], target: str) -> None:
        """Add the nodes from the images to the network's own input."""
        x = INPUT
        for i, (op, attributes, constant) in enumerate(steps):
            last = i + 1 == len(steps)
            name = self.free(LAYER if last else f"{LAYER}.{op.lower()}")
            inputs = [x]
            if constant is not None:
                constant_name = self.free(f"{LAYER}.{op.lower()}.by")
                inputs.append(self.builder.constant(constant_name, constant))
            x = self.builder.node(op, inputs, name, output=target if last else "", **attributes)

    def lead_out(
        self, steps: Sequence[tuple[str, dict[str, Any]]], x: str
    ) -> Iterator[onnx.NodeProto]:
        """Yield the nodes from the network's result to the logits."""
        for i, (op, attributes) in enumerate(steps):
            last = i + 1 == len(steps)
            name = self.free(OUTPUT if last else f"{OUTPUT}.{op.lower()}")
            yield helper.make_node(op, [x], [OUTPUT if last else name], name=name, **attributes)
            x = name


def _rename(graph: onnx.GraphProto, old: str, new: str) -> None:
    """Rename a tensor wherever it is made, kept or read."""
    for value in [*graph.input, *graph.output, *graph.initializer]:
        if value.name == old:
            value.name = new
    for node in graph.node:
        for names in (node.input, node.output):
            for i, name in enumerate(names):
                if name == old:
                    names[i] = new


def _set_signature(graph: onnx.GraphProto, form: Format) -> None:
    del graph.input[:], graph.output[:]
    graph.input.extend(floats({INPUT: [BATCH, *form.image_shape]}))
    graph.output.extend(floats({OUTPUT: [BATCH, form.classes]}))
