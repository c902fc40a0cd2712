"""Operands on the grids of int8 and fp8, as the deployed graph has them and as it might have.

Errors of a grid are not random: the deployed one rounds every image alike. The first draw takes
the deployed grid, the others take grids up to :data:`STRETCH` finer or coarser with the same
limits: errors of the same kind that fall otherwise. No grid is shifted, since every one holds 0
exactly, which is what most activations are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Node
from ccn_deploy.graph.layers import layer_of, layer_outputs
from ccn_deploy.graph.structure import channel_axis, find_norms
from ccn_deploy.parity.rounding_rules import Errors

STRETCH = 0.05
"""How much finer or coarser than the deployed grid the others are."""

_FORMATS: dict[str, tuple[float, torch.dtype | None]] = {
    "int8": (127.0, None),
    "fp8": (448.0, torch.float8_e4m3fn),
}
"""Largest number of each grid, and its dtype if its steps are not equal."""


@dataclass
class Grids:
    """Which operands are on a grid, and the activations that were put there.

    Attributes:
        format: ``"int8"`` or ``"fp8"``; empty if nothing is on a grid.
        limits: By tensor: the largest absolute value to represent.
        products: The nodes that multiply such a tensor by weights on a grid, each with the axis of
            output channels in its weights.
        readers: The nodes that read each such tensor off the grid: products, and the norm branches
            of compact layers, which take the norm of what the product multiplies.
        axes: By tensor: the axis on which the images lie.
    """

    format: str = ""
    limits: Mapping[str, float] = field(default_factory=dict)
    products: Mapping[str, int] = field(default_factory=dict)
    readers: Mapping[str, frozenset[str]] = field(default_factory=dict)
    axes: Mapping[str, int] = field(default_factory=dict)
    _made: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, model: GraphModule, format: str, ranges: Mapping[str, float]) -> Grids:
        """Find the operands by the names that the ranges have.

        Args:
            model: The forward graph. Weights may be stored in it or made by nodes of its own, as
                by ConstantOfShape: quantising folds those before it looks for products.
            format: Of the grid.
            ranges: By the name of a product's node, or of the layer that it is a part of: the
                largest absolute value of its input to represent. Other products that read the same
                tensor have the same grid.
        """
        if not ranges:
            return cls()
        graph, constants = model.graph, model.constants
        norms = find_norms(graph)
        inside = {name for norm in norms for name in norm.nodes}
        weights = {node.name: channel_axis(graph, node, constants) for node in graph.nodes}
        found = [
            node
            for node in graph.nodes
            if weights[node.name] is not None and (node.name not in inside or node.name in ranges)
        ]
        limits, layers, left = {}, layer_outputs(graph), dict(ranges)
        for node in found:
            key = node.name if node.name in left else layer_of(node.name, layers)
            if key in left:
                limits[node.inputs[0]] = left.pop(key)
        products = {
            node.name: axis
            for node in found
            if node.inputs[0] in limits and (axis := weights[node.name]) is not None
        }
        readers = {tensor: set(products) for tensor in limits}
        for norm in norms:
            product = graph.made_by.get(norm.product) if norm.kind == "compact" else None
            if product is not None and product.name in products:
                readers[product.inputs[0]].update(norm.nodes)
        axes = {
            tensor: next(
                at for at, size in enumerate(graph.shapes[tensor]) if isinstance(size, str)
            )
            for node in found
            for tensor in (node.inputs[0], node.outputs[0])
        }
        return cls(format, limits, products, {t: frozenset(r) for t, r in readers.items()}, axes)

    def apply(
        self, model: GraphModule, node: Node, given: list[Tensor | None], errors: Errors
    ) -> tuple[Tensor, ...]:
        """Run a node on noisy inputs, those of them on a grid that are."""
        for at, name in enumerate(node.inputs):
            value = given[at]
            if value is not None and node.name in self.readers.get(name, ()):
                if name not in self._made:
                    self._made[name] = self._activations(name, value, errors)
                given[at] = self._made[name]
        if node.name not in self.products:
            return model.apply(node, given)
        x, weight, *rest = given
        assert x is not None and weight is not None
        weights = self._weights(weight, self.products[node.name], errors)
        pieces = [
            model.apply(node, [piece, own, *rest])[0]
            for piece, own in zip(
                x.chunk(errors.draws, self.axes[node.inputs[0]]), weights, strict=True
            )
        ]
        return (torch.cat(pieces, self.axes[node.outputs[0]]),)

    def forget(self, tensor: str) -> None:
        """Let go of a tensor that no later node reads."""
        self._made.pop(tensor, None)

    def _activations(self, name: str, values: Tensor, errors: Errors) -> Tensor:
        """Put each draw of a tensor on a grid of its own."""
        axis = self.axes[name]
        stretch = _stretch(errors, values.dtype)
        stretch = stretch.repeat_interleave(values.shape[axis] // errors.draws)
        sides = [-1 if side == axis else 1 for side in range(values.dim())]
        limit = torch.tensor(self.limits[name], dtype=values.dtype)
        return self._rounded(values, limit, stretch.view(sides))

    def _weights(self, weight: Tensor, axis: int, errors: Errors) -> list[Tensor]:
        """Return weights for every draw, of which each channel is on a grid of its own."""
        others = [side for side in range(weight.dim()) if side != axis]
        limit = weight.abs().amax(others, keepdim=True).clamp(min=1e-30)
        return [self._rounded(weight, limit, s) for s in _stretch(errors, weight.dtype)]

    def _rounded(self, values: Tensor, limit: Tensor, stretch: Tensor) -> Tensor:
        largest, dtype = _FORMATS[self.format]
        scale = limit * stretch / largest
        steps = values.clamp(min=-limit, max=limit) / scale
        if dtype is None:
            return steps.round() * scale
        return steps.clamp(-largest, largest).to(dtype).to(values.dtype) * scale


def _stretch(errors: Errors, dtype: torch.dtype) -> Tensor:
    """Return how much coarser each draw's grid is than the deployed one, [draws]."""
    stretch = torch.empty(errors.draws, dtype=dtype)
    stretch.uniform_(1 - STRETCH, 1 + STRETCH, generator=errors.generator)
    if errors.deployed:
        stretch[0] = 1.0
    return stretch
