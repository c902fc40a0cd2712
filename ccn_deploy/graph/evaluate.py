"""A graph evaluated in PyTorch: in float64 the reference, in float32 what attacks climb.

Everything that is floating-point is computed in one type, whatever the graph's own types are;
a cast to a type of fewer bits rounds to that type's values. Gradients come from autograd.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ccn_deploy.errors import GraphError, one_line
from ccn_deploy.graph.calls import Call, Function
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.ops import OPERATORS
from ccn_deploy.graph.ops_shape import TORCH_TYPES
from ccn_deploy.graph.signature import OUTPUT

Values = dict[str, Tensor | None]

_FROM_SIZES = frozenset({"Cast", "ConstantOfShape", "Range"})


@dataclass
class _Step:
    """One node ready to run; ``done`` are the tensors that no later node reads."""

    node: Node
    run: Function
    inputs: tuple[str, ...]
    done: tuple[str, ...] = ()


class GraphModule(nn.Module):
    """A graph as a PyTorch module, without parameters.

    Constants are buffers that no state dict holds; integers among them, which are sizes and
    indices, stay on the CPU. Nodes that depend on constants alone are computed once, here.

    Args:
        graph: The graph; its first input is the images.
        dtype: ``torch.float32``, or ``torch.float64`` for the reference.

    Raises:
        GraphError: An operator, or a setting of one, that has no function; names the node.
    """

    def __init__(self, graph: Graph, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.graph = graph
        self.dtype = dtype
        self.output = OUTPUT if OUTPUT in graph.outputs else graph.outputs[0]
        self._buffer_of: dict[str, str] = {}
        self._integers: dict[str, Tensor] = {}
        self._types = {name: value.dtype for name, value in graph.constants.items()}
        for name, value in graph.constants.items():
            self._keep(name, as_tensor(value, dtype))
        self._functions: dict[str, Function] = {}
        self._folded: set[str] = set()
        for node in graph.nodes:
            self._prepare(node)
        self._program = self._steps({self.output})
        if dtype == torch.float32:
            self._use_channels_last()
            self._program = self._join_quotients(self._program)

    def forward(self, images: Tensor, *more: Tensor) -> Tensor:
        """Return the logits [N, classes] of images [N, C, H, W], in this module's dtype.

        Args:
            images: float32 or float64; converted to the module's dtype.
            *more: What the graph's further inputs are given, in their order.

        Raises:
            GraphError: A node cannot be computed, such as a reshape that fits another batch.
        """
        values = self._given(images, more)
        for step in self._program:
            self._run(step, values, images.device)
            for name in step.done:
                del values[name]
        result = values[self.output]
        assert result is not None
        return result

    def values(
        self, images: Tensor, names: Collection[str] | None = None, *more: Tensor
    ) -> dict[str, Tensor]:
        """Return tensors of the graph by name.

        Args:
            images: As for :meth:`forward`.
            names: The tensors wanted; None for all, with inputs and constants.
            *more: As for :meth:`forward`.

        Raises:
            GraphError: As for :meth:`forward`, or a name that the graph has not.
        """
        values = self._given(images, more)
        wanted = None if names is None else set(names)
        for step in self._steps(wanted):
            self._run(step, values, images.device)
            for name in step.done:
                del values[name]
        for name in wanted or ():
            if values.get(name) is None:
                raise GraphError(f"The graph has no tensor {name!r}.", "Name one that it has.")
        return {
            name: value
            for name, value in values.items()
            if value is not None and (wanted is None or name in wanted)
        }

    def steps(
        self, images: Tensor, *more: Tensor
    ) -> Iterator[tuple[Node, list[Tensor | None], tuple[Tensor, ...]]]:
        """Run every node in order and yield it with what it read and what it made.

        Nodes that depend on constants alone are among them. Tensors are let go after their last
        use.

        Raises:
            GraphError: As for :meth:`forward`.
        """
        values = self._given(images, more)
        for step in self._steps(set(self.graph.outputs), folded=True):
            inputs = [values[name] for name in step.node.inputs]
            if step.node.name not in self._folded:
                self._run(step, values, images.device)
            made = (values[name] for name in step.node.outputs if name)
            yield step.node, inputs, tuple(value for value in made if value is not None)
            del inputs
            for name in step.done:
                del values[name]

    def apply(  # type: ignore[override]
        self, node: Node, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        """Run one node on given inputs, which may hold any number of images.

        Settings that are constants in the graph, such as axes, sizes and bounds, are the graph's.

        Raises:
            GraphError: It cannot be computed.
        """
        return self._call(node, self._functions[node.name], inputs)

    @property
    def constants(self) -> dict[str, Tensor]:
        """What no image changes, by name: stored in the graph, or made by nodes of what is."""
        made = {name: self._buffers[key] for name, key in self._buffer_of.items()}
        return {name: v for name, v in (made | self._integers).items() if v is not None}

    def _prepare(self, node: Node) -> None:
        operator = OPERATORS.get(node.op)
        if operator is None:
            raise GraphError(
                f"Node {node.name!r}: no operator {node.op} is known here.",
                "Export the network with standard operators of ONNX.",
            )
        known = tuple(self._constant(name) for name in node.inputs)
        call = Call(
            name=node.name,
            op=node.op,
            attributes=node.attributes,
            opset=self.graph.opset,
            dtype=self.dtype,
            outputs=max((i + 1 for i, name in enumerate(node.outputs) if name), default=1),
            known=known,
            types=tuple(self._types.get(name) for name in node.inputs),
        )
        function = self._functions[node.name] = operator(call)
        if all(
            value is not None or not name for name, value in zip(node.inputs, known, strict=True)
        ):
            self._folded.add(node.name)
            made = self._call(node, function, known)
            for name, value in zip(node.outputs, made, strict=False):
                if name:
                    self._keep(name, value)

    def _steps(self, wanted: set[str] | None, *, folded: bool = False) -> list[_Step]:
        """Return the nodes that tensors depend on, with what can be let go after each."""
        nodes = [n for n in self.graph.nodes if folded or n.name not in self._folded]
        if wanted is None:
            return [_Step(node, self._functions[node.name], node.inputs) for node in nodes]
        needed = set(wanted)
        steps: list[_Step] = []
        for node in reversed(nodes):
            if needed.isdisjoint(node.outputs):
                continue
            # What no node behind this one reads ends here; constants are in nobody's way.
            held = (*dict.fromkeys((*node.inputs, *node.outputs)),)
            done = [
                name
                for name in held
                if name and name not in needed and self._constant(name) is None
            ]
            needed.update(name for name in node.inputs if name)
            steps.append(_Step(node, self._functions[node.name], node.inputs, tuple(done)))
        return steps[::-1]

    def _run(self, step: _Step, values: Values, device: torch.device) -> None:
        node = step.node
        made = self._call(node, step.run, [values[name] for name in step.inputs])
        if node.op in _FROM_SIZES:  # sizes are on the CPU, and what is made of them as well
            made = tuple(x.to(device) if x.is_floating_point() else x for x in made)
        values.update(zip(node.outputs, made, strict=False))

    def _call(
        self, node: Node, function: Function, inputs: Sequence[Tensor | None]
    ) -> tuple[Tensor, ...]:
        try:
            made = function(*inputs)
        except (GraphError, torch.OutOfMemoryError):
            raise
        except (RuntimeError, IndexError, ValueError, TypeError, KeyError) as error:
            raise GraphError(
                f"Node {node.name!r} ({node.op}) cannot be computed: {one_line(error)}.",
                "Check the graph's shapes and the size of the batch that it is made for.",
            ) from error
        return made if isinstance(made, tuple) else (made,)

    def _given(self, images: Tensor, more: Sequence[Tensor]) -> Values:
        values: Values = {name: self._buffers[key] for name, key in self._buffer_of.items()}
        values.update(self._integers)
        values[""] = None
        for name, value in zip(self.graph.inputs, (images, *more), strict=True):
            values[name] = value.to(self.dtype) if value.is_floating_point() else value
        return values

    def _keep(self, name: str, value: Tensor) -> None:
        if not value.is_floating_point():
            self._integers[name] = value
            return
        key = f"constant_{len(self._buffer_of)}"  # a buffer's name may hold no dots
        self._buffer_of[name] = key
        self.register_buffer(key, value, persistent=False)

    def _constant(self, name: str) -> Tensor | None:
        if name in self._buffer_of:
            return self._buffers[self._buffer_of[name]]
        return self._integers.get(name)

    def _use_channels_last(self) -> None:
        """Lay kernels out as a CPU's float32 convolutions like them: a quarter faster."""
        for node in self.graph.nodes:
            key = self._buffer_of.get(node.inputs[1]) if node.op == "Conv" else None
            weight = self._buffers[key] if key else None
            if key and weight is not None and weight.dim() == 4:
                # `contiguous` would leave the strides of kernels with one channel as they are.
                turned = torch.empty(weight.shape, memory_format=torch.channels_last)
                self._buffers[key] = turned.copy_(weight)

    def _join_quotients(self, steps: list[_Step]) -> list[_Step]:
        """Compute a / b + constant in one pass: a compact layer then costs what its module does.

        Only float32 uses it: it rounds once more.
        """
        joined: list[_Step] = []
        for step in steps:
            last = joined[-1] if joined else None
            if last is not None and last.node.op == "Div" and step.node.op == "Add":
                (quotient,) = last.node.outputs
                others = [name for name in step.inputs if name != quotient]
                if len(others) == 1 and quotient in step.done and others[0] in self._buffer_of:
                    done = tuple(name for name in (*last.done, *step.done) if name != quotient)
                    joined[-1] = _Step(step.node, _quotient_plus, (*last.inputs, *others), done)
                    continue
            joined.append(step)
        return joined


def _quotient_plus(dividend: Tensor, divisor: Tensor, addend: Tensor) -> Tensor:
    return torch.addcmul(addend, dividend, divisor.reciprocal())


def as_tensor(value: NDArray[Any], dtype: torch.dtype) -> Tensor:
    """Return a constant in torch: floats in ``dtype``, integers in a type wide enough for them."""
    if value.dtype.name in TORCH_TYPES:
        wide = TORCH_TYPES[value.dtype.name]
        return torch.from_numpy(value.astype(str(wide).removeprefix("torch.")))
    name = "float64" if dtype == torch.float64 else "float32"
    return torch.from_numpy(np.array(value, dtype=name))  # an own copy: files are read-only
