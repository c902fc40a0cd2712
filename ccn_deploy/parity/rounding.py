"""How much of a deviation rounding explains: a Monte-Carlo model of floating-point error.

The float64 graph is run with random errors of the size and in the places that an arithmetic of
unit roundoff u would make them. Errors then travel through the real network, so whatever
amplifies or damps them there (the division of a compact layer, a pool, a dead activation) is
accounted for. ``docs/parity.md`` derives the model and shows how it was calibrated.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.signature import BATCH
from ccn_deploy.graph.structure import find_norms
from ccn_deploy.parity.grids import Grids
from ccn_deploy.parity.rounding_rules import Errors, Size, Step, apart, round_result
from ccn_deploy.parity.tolerances import Arithmetic

_DOUBLES = 2**22
"""Numbers that one wide tensor of one pass may hold: 32 MiB in float64."""

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
    per_layer: bool = True,
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
        per_layer: Whether layers before the last are wanted.

    Returns:
        Layer name -> max over images, draws and elements of ``|noisy - exact|``, in the order of
        execution; the last entry is that of the logits. Layers in whose tensors images lie
        interleaved are left out.
    """
    generator = torch.Generator().manual_seed(seed)
    layers = _comparable(model, images[:1])
    if not per_layer:
        layers = dict([list(layers.items())[-1]])
    units = dict.fromkeys(layers, 0.0)
    names: dict[str, list[str]] = {}
    for name, tensor in layers.items():
        names.setdefault(tensor, []).append(name)
    room = copies_at_once(model.graph)
    size = max(1, min(len(images), room // 2))
    for start in range(0, len(images), size):
        piece = images[start : start + size]
        exact = ExactRun()
        groups = max(1, draws // max(2, room // len(piece)))  # of two draws or more
        for group in range(groups):
            some = draws // groups + (group < draws % groups)
            errors = Errors(generator, some, deployed=group == 0)
            rounding = RoundingModel(model, arithmetic, errors, ranges or {})
            for tensor, noisy in rounding.run(piece, exact=exact, kept=names):
                for name in names.get(tensor, ()):
                    deviation = _largest_difference(exact.values[tensor], noisy)
                    units[name] = max(units[name], deviation)
    return units


@dataclass
class _Known:
    """A node that depends on the images, as the exact network ran it.

    Attributes:
        node: The node.
        constants: Those of its inputs that do not depend on the images, None for the others.
        axis: On which the images lie in its first result; None if nothing is rounded there.
        sizes: Of the errors that it makes.
    """

    node: Node
    constants: list[Tensor | None]
    axis: int | None = None
    sizes: list[Size] = field(default_factory=list)


@dataclass
class ExactRun:
    """What further draws on the same images need of the exact network, which is run only once.

    Attributes:
        values: By tensor: exact values of those that were to be kept.
        nodes: In order of execution.
    """

    values: dict[str, Tensor] = field(default_factory=dict)
    nodes: list[_Known] = field(default_factory=list)


@dataclass(frozen=True)
class RoundingModel:
    """A graph, run exactly and with errors side by side.

    Attributes:
        model: The forward graph in float64.
        arithmetic: What is modelled.
        errors: Random errors.
        ranges: As for :func:`rounding_units`.
        noisy: What the errors are made in: the same graph, in float32 where the errors of float32
            do not matter beside them; ``model`` itself if not given.
    """

    model: GraphModule
    arithmetic: Arithmetic
    errors: Errors
    ranges: Mapping[str, float] = field(default_factory=dict)
    noisy: GraphModule | None = None

    def run(
        self,
        images: Tensor,
        start: Tensor | None = None,
        *,
        exact: ExactRun | None = None,
        kept: Collection[str] = (),
    ) -> Iterator[tuple[str, Tensor]]:
        """Run every node that depends on the images, in order.

        Args:
            images: float64 [N, C, H, W].
            start: The images that errors are made on [draws * N, C, H, W], draw after draw; copies
                of ``images`` if not given.
            exact: Is filled by the first run and spares the exact network in later ones, of any
                number of draws on the same images.
            kept: Tensors whose values ``exact`` is to keep.

        Yields:
            (tensor, noisy values of draws * N images), for the first result of every node.
        """
        exact = ExactRun() if exact is None else exact
        graph, model = self.model.graph, self.noisy or self.model
        grids = Grids.of(self.model, self.arithmetic.grid, self.ranges)
        norms = _norm_nodes(graph)
        copies = torch.cat([images] * self.errors.draws) if start is None else start
        noisy: dict[str, Tensor] = {graph.inputs[0]: copies}
        last = {tensor: nodes[-1].name for tensor, nodes in graph.readers.items()}
        for known, inputs, total in self._nodes(images, noisy, exact, kept):
            node = known.node
            given = [
                noisy.get(name, value)
                for name, value in zip(node.inputs, known.constants, strict=True)
            ]
            made = grids.apply(model, node, given, self.errors)
            if total is not None:
                known.axis = _batch_axis(total, made[0])
            if known.axis is not None:
                step = self._step(known, inputs, total, given, made[0], in_norm=node.name in norms)
                made = (round_result(step), *made[1:])
            noisy.update((name, v) for name, v in zip(node.outputs, made, strict=False) if name)
            yield node.outputs[0], made[0]
            for name in node.inputs:
                if last.get(name) == node.name:
                    noisy.pop(name, None)
                    grids.forget(name)

    def _nodes(
        self, images: Tensor, noisy: Mapping[str, Tensor], exact: ExactRun, kept: Collection[str]
    ) -> Iterator[tuple[_Known, list[Tensor | None], Tensor | None]]:
        """Yield every node that depends on the images, with what it read and made in the exact run.

        The exact network runs only if it has not before.
        """
        if exact.nodes:
            for known in exact.nodes:
                yield known, [], None
            return
        fixed = (self.noisy or self.model).constants
        for node, inputs, outputs in self.model.steps(images):
            if noisy.keys().isdisjoint(node.inputs):
                continue  # made of constants alone
            exact.values.update({node.outputs[0]: outputs[0]} if node.outputs[0] in kept else {})
            constants = [None if name in noisy else fixed.get(name) for name in node.inputs]
            exact.nodes.append(_Known(node, constants))
            yield exact.nodes[-1], inputs, outputs[0]

    def _step(
        self,
        known: _Known,
        inputs: list[Tensor | None],
        total: Tensor | None,
        given: list[Tensor | None],
        result: Tensor,
        *,
        in_norm: bool,
    ) -> Step:
        """Return a node that was run on noisy inputs, with how its result is rounded."""
        node, axis = known.node, known.axis
        store, norm = self.arithmetic.store, self.arithmetic.norm
        assert axis is not None
        return Step(
            node=node,
            opset=self.model.graph.opset,
            run=lambda values: self.model.apply(node, values)[0],
            exact=inputs,
            total=total,
            noisy=given,
            result=result,
            axis=axis,
            constant=any(value is not None for value in known.constants[:2]),
            store=norm if in_norm else store,
            inner=norm,
            accumulate=norm if in_norm else self.arithmetic.accumulate,
            errors=self.errors,
            sizes=known.sizes,
        )


def copies_at_once(graph: Graph) -> int:
    """Return how many copies of images keep the widest tensor within 32 MiB in float64, at least 2.

    A C library hands larger pieces back to the system and gets them again, page by page, for every
    result; that takes longer than the arithmetic.
    """
    return max(2, _DOUBLES // max(_sizes(graph)))


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
    draws = apart(noisy.contiguous(), axis, exact.shape[axis])
    return float((draws - exact.unsqueeze(axis)).abs_().max())
