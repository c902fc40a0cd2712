"""The gradient graph while it is written, and one node of the forward graph on the way back."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any, NoReturn

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, helper

from ccn_deploy.errors import NoGradientError
from ccn_deploy.graph.builder import free_name, stored
from ccn_deploy.graph.graph import Graph, Node, Shape
from ccn_deploy.graph.signature import CANDIDATES, COTANGENTS

STILL_WORKS = (
    "Export with --no-gradient: parity, serving, and attacks by scores and by labels need no "
    "gradients of the runtime."
)


@dataclass(frozen=True)
class Gradient:
    """A gradient on its way back: ``tensor * factor``.

    What is the same for all candidates of an image is gathered in the factor, and multiplied into
    the many candidates once. For a forward tensor of shape S:

    Attributes:
        tensor: Name of a tensor [candidates, *S]. With a factor, sizes of S may be 1 instead
            where the factor has them.
        factor: Name of a tensor that broadcasts to S, without the axis of candidates, or None
            for 1.
    """

    tensor: str
    factor: str | None = None


class Tape:
    """The gradient graph so far: the nodes of the forward graph, and those that were added.

    Equal steps and equal constants are added once, under the first name asked for.

    Args:
        forward: The canonical forward graph.
    """

    def __init__(self, forward: Graph) -> None:
        self.forward = forward
        self.nodes: list[onnx.NodeProto] = list(forward.model.graph.node)
        self.constants: dict[str, TensorProto] = {
            c.name: c for c in forward.model.graph.initializer
        }
        self._names = {name for node in self.nodes for name in (node.name, *node.output)}
        self._names.update(self.constants, forward.inputs)
        self._known: dict[object, list[str]] = {}

    def node(
        self, op: str, inputs: Sequence[str], name: str, outputs: int = 1, **attributes: Any
    ) -> list[str]:
        """Add a step and return the names of its outputs; the first is the node's own name."""
        key = (op, tuple(inputs), outputs, repr(sorted(attributes.items())))
        if key not in self._known:
            first = free_name(name, self._names)
            rest = [free_name(f"{name}.{i}", self._names) for i in range(1, outputs)]
            self.nodes.append(
                helper.make_node(op, list(inputs), [first, *rest], name=first, **attributes)
            )
            self._known[key] = [first, *rest]
        return self._known[key]

    def constant(self, value: NDArray[Any] | np.generic, name: str) -> str:
        """Add a constant and return its name. The dtype is that of ``value``."""
        key = (value.dtype.str, value.shape, value.tobytes())
        if key not in self._known:
            free = free_name(name, self._names)
            self.constants[free] = stored(free, value)
            self._known[key] = [free]
        return self._known[key][0]

    def candidates(self) -> str:
        """Return the name of an int64 tensor [1]: how many candidates there are."""
        name = f"{COTANGENTS}.{CANDIDATES}"
        return self.node("Shape", [COTANGENTS], name, start=1, end=2)[0]


@dataclass(frozen=True)
class Site:
    """One node of the forward graph on the way back.

    Attributes:
        tape: Takes the steps.
        node: The forward node.
        incoming: Gradients at its outputs; None at an output that the logits do not depend on.
        live: Tensors that need a gradient.
    """

    tape: Tape
    node: Node
    incoming: tuple[Gradient | None, ...]
    live: Collection[str]

    # What the forward pass left

    @property
    def x(self) -> str:
        """Name of the node's first input."""
        return self.node.inputs[0]

    @property
    def y(self) -> str:
        """Name of the node's first output."""
        return self.node.outputs[0]

    def needed(self, index: int) -> bool:
        """Whether an input needs a gradient."""
        return index < len(self.node.inputs) and self.node.inputs[index] in self.live

    def given(self, index: int) -> bool:
        """Whether an optional input is there."""
        return index < len(self.node.inputs) and bool(self.node.inputs[index])

    def attribute(self, name: str, default: Any = None) -> Any:
        """Return an attribute of the node."""
        return self.node.attributes.get(name, default)

    def value(self, index: int) -> NDArray[Any] | None:
        """Return the value of a constant input; None if it is computed."""
        name = self.node.inputs[index]
        constants, fixed = self.tape.forward.constants, self.tape.forward.fixed
        return constants[name] if name in constants else fixed.get(name)

    def constant(self, index: int, what: str) -> NDArray[Any]:
        """Return the value of an input that must be constant.

        Raises:
            NoGradientError: It is computed.
        """
        value = self.value(index)
        return self.refuse(f"has {what} that is computed") if value is None else value

    def integers(self, index: int, what: str) -> list[int]:
        """Return a constant input of integers, flattened."""
        return [int(value) for value in self.constant(index, what).reshape(-1)]

    def shape(self, tensor: str) -> Shape:
        """Return the shape of a forward tensor."""
        return self.tape.forward.shapes[tensor]

    def rank(self, tensor: str) -> int:
        """Return how many axes a forward tensor has."""
        return len(self.shape(tensor))

    def sizes(self, tensor: str, axes: Sequence[int] | None = None) -> list[int]:
        """Return sizes of a forward tensor: of the axes given, or of all but the first.

        Raises:
            NoGradientError: One of them depends on the batch.
        """
        shape = self.shape(tensor)
        found = [shape[axis] for axis in (range(1, len(shape)) if axes is None else axes)]
        fixed = [size for size in found if isinstance(size, int)]
        if len(fixed) < len(found):
            self.refuse("works along an axis that depends on the batch")
        return fixed

    def refuse(self, why: str) -> NoReturn:
        """Raise the error that says why this node has no gradient."""
        raise no_gradient(self.node, why)

    # Steps

    def many(self, op: str, inputs: Sequence[str], outputs: int, **attributes: Any) -> list[str]:
        """Add a step of several outputs."""
        name = f"{self.node.name}.grad.{op.lower()}"
        return self.tape.node(op, inputs, name, outputs, **attributes)

    def add(self, op: str, *inputs: str, part: str = "", **attributes: Any) -> str:
        """Add a step, which is called ``<node>.grad.<part>``, by default after its op."""
        name = f"{self.node.name}.grad.{part or op.lower()}"
        return self.tape.node(op, inputs, name, **attributes)[0]

    def array(self, value: NDArray[Any] | np.generic, part: str = "constant") -> str:
        """Add a constant; floats as float32."""
        array = np.asarray(value)
        if array.dtype.kind == "f":
            array = array.astype(np.float32)
        return self.tape.constant(array, f"{self.node.name}.grad.{part}")

    def number(self, value: float) -> str:
        """Add a float32 scalar."""
        return self.array(np.float32(value), "number")

    def ints(self, *values: int) -> str:
        """Add a constant of int64 sizes or axes."""
        return self.array(np.array(values, dtype=np.int64), "sizes")

    def floats(self, truth: str) -> str:
        """Return a tensor of bool as 0.0 and 1.0."""
        return self.add("Cast", truth, to=TensorProto.FLOAT)

    # Gradients

    def scaled(self, gradient: Gradient, own: str) -> Gradient:
        """Multiply a gradient by what all candidates share, later.

        ``own`` must broadcast to the shape that the gradient is for.
        """
        if gradient.factor is not None:
            own = self.add("Mul", gradient.factor, own, part="factor")
        return replace(gradient, factor=own)

    def times(self, gradient: Gradient, number: float) -> Gradient:
        """Multiply a gradient by a number."""
        if number == 1:
            return gradient
        if gradient.factor is not None:
            return replace(gradient, factor=self.add("Mul", gradient.factor, self.number(number)))
        return Gradient(self.add("Mul", gradient.tensor, self.number(number)))

    def whole(self, gradient: Gradient) -> str:
        """Return the tensor of a gradient with its factor multiplied in."""
        if gradient.factor is None:
            return gradient.tensor
        return self.add("Mul", gradient.tensor, gradient.factor, part="whole")

    def summed(self, tensor: str, axes: Sequence[int], keepdims: bool = True) -> str:
        """Add up a gradient [candidates, ...] along axes of the forward tensor."""
        if not axes:
            return tensor
        shifted = self.ints(*[axis + 1 for axis in axes])
        return self.add("ReduceSum", tensor, shifted, keepdims=int(keepdims))

    def sum_to(self, tensor: str, wanted: Shape, found: Shape) -> str:
        """Add up [candidates, *found] to [candidates, *wanted], which was broadcast to found."""
        missing = len(found) - len(wanted)
        stretched = [
            missing + axis for axis, size in enumerate(wanted) if size != found[missing + axis]
        ]
        if any(wanted[axis - missing] != 1 for axis in stretched):
            self.refuse(f"broadcasts {list(wanted)} to {list(found)}")
        tensor = self.summed(tensor, [*range(missing), *stretched])
        if not missing:
            return tensor
        return self.add("Squeeze", tensor, self.ints(*range(1, missing + 1)))

    def sum_like(self, tensor: str, index: int) -> Gradient:
        """Add up a gradient of the output's shape to that of an input which was broadcast."""
        wanted = self.shape(self.node.inputs[index])
        return Gradient(self.sum_to(tensor, wanted, self.shape(self.y)))

    def fold(self, tensor: str, inner: Sequence[int]) -> str:
        """Make [candidates, N, *inner] a batch [candidates * N, *inner], in place."""
        return self.add("Reshape", tensor, self.ints(-1, *inner), part="folded")

    def unfold(self, tensor: str, inner: Sequence[int]) -> str:
        """Undo :meth:`fold`."""
        shape = self.add(
            "Concat", self.tape.candidates(), self.ints(-1, *inner), part="shape", axis=0
        )
        return self.add("Reshape", tensor, shape, part="unfolded")

    def shaped(self, tensor: str, shape: Shape) -> str:
        """Give [candidates, ...] the shape [candidates, *shape] of as many numbers."""
        return self.add("Reshape", tensor, self.target(shape), part="shaped")

    def target(self, shape: Shape) -> str:
        """Return the constant that Reshape reads as [candidates, *shape].

        Raises:
            NoGradientError: Two sizes depend on the batch.
        """
        if sum(isinstance(size, str) for size in shape) > 1:
            self.refuse(f"has the shape {list(shape)}, in which two sizes depend on the batch")
        # 0 stands for the size that is there: the number of candidates.
        return self.ints(0, *[size if isinstance(size, int) else -1 for size in shape])


def no_gradient(node: Node, why: str) -> NoGradientError:
    """Return the error that says why a node has no gradient, and what works without one."""
    return NoGradientError(f"No gradient graph: {node.op} node {node.name!r} {why}.", STILL_WORKS)
