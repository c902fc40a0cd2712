"""How much of a deviation rounding explains: a Monte-Carlo model of floating-point error.

The float64 graph is run with random errors of the size and in the places that an arithmetic of
unit roundoff u would make them. Errors then travel through the real network, so whatever
amplifies or damps them there (the division of a compact layer, a pool, a dead activation) is
accounted for. ``docs/parity.md`` derives the model and shows how it was calibrated.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.signature import BATCH
from ccn_deploy.graph.structure import find_norms
from ccn_deploy.parity.grids import Grids
from ccn_deploy.parity.rounding_rules import Errors, Step, round_result
from ccn_deploy.parity.tolerances import Arithmetic

_DOUBLES = 2**23
"""Numbers that one wide tensor of one pass may hold: 64 MiB in float64."""

_KEPT_DOUBLES = 2**27
"""Numbers that all tensors of one pass may hold together where autograd keeps them: 1 GiB."""


def rounding_units(
    model: GraphModule,
    images: Tensor,
    arithmetic: Arithmetic,
    *,
    draws: int = 8,
    seed: int = 0,
    ranges: Mapping[str, float] | None = None,
) -> dict[str, float]:
    """Return, for each layer, the largest absolute deviation that rounding produced.

    Args:
        model: The forward graph in float64.
        images: float64 [N, C, H, W] in [0, 1].
        arithmetic: What is modelled.
        draws: Repetitions per image, at least 2.
        seed: Of the errors.
        ranges: For each product that is quantised, by the name of its node or layer, the largest
            absolute input to represent.

    Returns:
        Layer name -> max over images, draws and elements of ``|noisy - exact|``, in the order of
        execution; the last entry is that of the logits. Layers in whose tensors images lie
        interleaved are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _comparable(model, images[:1])
    units = dict.fromkeys(layers, 0.0)
    names: dict[str, list[str]] = {}
    for name, tensor in layers.items():
        names.setdefault(tensor, []).append(name)
    rounding = RoundingModel(model, arithmetic, Errors(generator, draws), ranges or {})
    size = images_at_once(model.graph, draws)
    for start in range(0, len(images), size):
        for tensor, exact, noisy in rounding.run(images[start : start + size]):
            for name in names.get(tensor, ()):
                units[name] = max(units[name], _largest_difference(exact, noisy))
    return units


@dataclass(frozen=True)
class RoundingModel:
    """A graph, run exactly and with errors side by side.

    Attributes:
        model: The forward graph in float64.
        arithmetic: What is modelled.
        errors: Random errors.
        ranges: As for :func:`rounding_units`.
    """

    model: GraphModule
    arithmetic: Arithmetic
    errors: Errors
    ranges: Mapping[str, float] = field(default_factory=dict)

    def run(
        self, images: Tensor, start: Tensor | None = None
    ) -> Iterator[tuple[str, Tensor, Tensor]]:
        """Run every node that depends on the images, in order.

        Args:
            images: float64 [N, C, H, W].
            start: The images that errors are made on [draws * N, C, H, W], draw after draw; copies
                of ``images`` if not given.

        Yields:
            (tensor, exact values, noisy values of draws * N images), for the first result of every
            node.
        """
        graph = self.model.graph
        grids = Grids.of(graph, self.arithmetic.grid, self.ranges)
        norms = _norm_nodes(graph)
        copies = torch.cat([images] * self.errors.draws)
        noisy: dict[str, Tensor] = {graph.inputs[0]: copies if start is None else start}
        last = {tensor: nodes[-1].name for tensor, nodes in graph.readers.items()}
        for node, inputs, outputs in self.model.steps(images):
            if noisy.keys().isdisjoint(node.inputs):
                continue  # made of constants alone
            given = [
                noisy.get(name, value) for name, value in zip(node.inputs, inputs, strict=True)
            ]
            made = self._noisy(node, inputs, outputs[0], given, grids, in_norm=node.name in norms)
            noisy.update((name, v) for name, v in zip(node.outputs, made, strict=False) if name)
            yield node.outputs[0], outputs[0], made[0]
            for name in node.inputs:
                if last.get(name) == node.name:
                    noisy.pop(name, None)
                    grids.forget(name)

    def _noisy(
        self,
        node: Node,
        inputs: list[Tensor | None],
        exact: Tensor,
        given: list[Tensor | None],
        grids: Grids,
        *,
        in_norm: bool,
    ) -> tuple[Tensor, ...]:
        """Return the results of one node on noisy inputs, with its own errors in the first."""
        made = grids.apply(self.model, node, given, self.errors)
        axis = _batch_axis(exact, made[0])
        if axis is None:
            return made
        store, norm = self.arithmetic.store, self.arithmetic.norm
        step = Step(
            node=node,
            opset=self.model.graph.opset,
            run=lambda values: self.model.apply(node, values)[0],
            exact=inputs,
            noisy=given,
            result=made[0],
            axis=axis,
            constant=any(name in self.model.graph.constants for name in node.inputs[:2]),
            store=norm if in_norm else store,
            inner=norm,
            accumulate=norm if in_norm else self.arithmetic.accumulate,
            errors=self.errors,
        )
        return round_result(step), *made[1:]


def images_at_once(graph: Graph, draws: int) -> int:
    """Return how many images at a time keep the widest tensor within 64 MiB in float64.

    Args:
        graph: Forward.
        draws: Repetitions of each image.
    """
    return max(1, _DOUBLES // (draws * max(_sizes(graph))))


def images_kept(graph: Graph, copies: int = 1) -> int:
    """Return how many images at a time keep all tensors together within 1 GiB in float64.

    Args:
        graph: Forward.
        copies: How often each tensor is there.
    """
    return max(1, _KEPT_DOUBLES // (copies * sum(_sizes(graph))))


def _sizes(graph: Graph) -> list[int]:
    """Return how many numbers each tensor that depends on the images has for one of them."""
    many = dict.fromkeys(graph.floats, 1)
    for name in many:
        for size in graph.shapes[name]:
            factor = size.partition("*")[0] if isinstance(size, str) else size
            many[name] *= 1 if factor == BATCH else int(factor)
    return list(many.values())


def _norm_nodes(graph: Graph) -> frozenset[str]:
    """Return the nodes of norm branches up to the divisor; a quotient is stored as anything is."""
    nodes = {node.name: node for node in graph.nodes}
    inside: set[str] = set()
    for norm in find_norms(graph):
        for name in norm.nodes if norm.summed else ():
            read = set(nodes[name].inputs)
            if norm.product in read and nodes[name].op in ("Div", "Mul") and len(read) > 1:
                break
            inside.add(name)
    return frozenset(inside)


def _batch_axis(exact: Tensor, noisy: Tensor) -> int | None:
    """Return the axis on which the images lie; None if the tensor depends on none."""
    sizes = zip(exact.shape, noisy.shape, strict=True)
    return next((axis for axis, (one, many) in enumerate(sizes) if one != many), None)


def _comparable(model: GraphModule, images: Tensor) -> dict[str, str]:
    """Return the layers whose tensors hold image after image: those of two copies are two copies.

    Where images have an axis of their own that is known; an axis that they share is tried.
    """
    layers, shapes = layer_outputs(model.graph), model.graph.shapes
    shared = {tensor for tensor in layers.values() if BATCH not in shapes[tensor]}
    if not shared:
        return layers
    other = images.flip(-1) / 2
    once = model.values(torch.cat([images, other]), shared)
    twice = model.values(torch.cat([images, other] * 2), shared)
    odd = set()
    for tensor in shared:
        axis = _batch_axis(once[tensor], twice[tensor])
        joined = None if axis is None else torch.cat([once[tensor]] * 2, axis)
        if joined is None or not torch.allclose(joined, twice[tensor]):
            odd.add(tensor)
    return {name: tensor for name, tensor in layers.items() if tensor not in odd}


def _largest_difference(exact: Tensor, noisy: Tensor) -> float:
    axis = _batch_axis(exact, noisy)
    if axis is None:
        return 0.0
    repeated = torch.cat([exact] * (noisy.shape[axis] // exact.shape[axis]), axis)
    return float((noisy - repeated).abs().max())
