"""What a network meets on real images, and what fp16 makes or would make of it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ccn_deploy.exporters.precision.fused import NORMALISED, normalised
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph, Node
from ccn_deploy.graph.layers import layer_outputs
from ccn_deploy.graph.structure import Norm, find_norms

FP16_LARGEST = 65504.0
FP16_SMALLEST = 2.0**-24
"""The smallest subnormal; half of it and less become 0."""

BATCH = 16


@dataclass(frozen=True)
class LayerRange:
    """What a norm met.

    Attributes:
        layer: Its name: that of the compact layer, or of the normalisation's node.
        kind: ``"compact"``, ``"layer"``, ``"instance"`` and so on.
        largest_sum: Largest sum of squares that is rooted.
        smallest_sum: Smallest that is not 0; 0 if all are.
        headroom: fp16's largest number over ``largest_sum``: below 1 it would overflow.
        floor_room: ``smallest_sum`` over fp16's smallest number: below 1 it would become 0.
        smallest_divisor: Smallest number that is divided by.
        largest_product: Largest absolute value that is divided, which of a compact layer fp16 does
            compute.
    """

    layer: str
    kind: str
    largest_sum: float
    smallest_sum: float
    headroom: float
    floor_room: float
    smallest_divisor: float
    largest_product: float

    def warnings(self) -> list[str]:
        """Say what fp16 could not hold, one sentence each."""
        found = []
        if self.headroom < 1:
            found.append(
                f"{self.layer}: sums of squares up to {self.largest_sum:.3g} overflow fp16 "
                f"({FP16_LARGEST:g}); its norm branch stays float32."
            )
        if 0 < self.floor_room < 1:
            found.append(
                f"{self.layer}: sums of squares down to {self.smallest_sum:.1e} are 0 in fp16 "
                f"(its smallest is {FP16_SMALLEST:.1e}); its norm branch stays float32."
            )
        if self.kind == "compact" and self.largest_product > FP16_LARGEST:
            found.append(
                f"{self.layer}: products up to {self.largest_product:.3g} overflow fp16, where "
                f"they are computed: export in bf16, or with --keep-fp32 {self.layer}."
            )
        return found


@dataclass(frozen=True)
class NumericReport:
    """What every norm and every layer met.

    Attributes:
        images: Images run.
        layers: Of the norms, in order of execution; none in a network without norms.
        activations: By layer: the largest absolute value that it returned.
    """

    images: int
    layers: tuple[LayerRange, ...]
    activations: Mapping[str, float]

    @property
    def warnings(self) -> tuple[str, ...]:
        """Where fp16 without protected norms would over- or underflow, and where it does."""
        norms = tuple(warning for layer in self.layers for warning in layer.warnings())
        return norms + tuple(
            f"{layer}: values up to {largest:.3g} overflow fp16 ({FP16_LARGEST:g}): export in "
            f"bf16, or with --keep-fp32 {layer} and what reads it."
            for layer, largest in self.activations.items()
            if not largest <= FP16_LARGEST
        )

    def document(self) -> dict[str, Any]:
        """Return the form that stands in the manifest."""
        return {
            "images": self.images,
            "layers": [asdict(layer) for layer in self.layers],
            "activations": dict(self.activations),
            "warnings": list(self.warnings),
        }


def numeric_report(graph: Graph, images: NDArray[np.float32]) -> NumericReport:
    """Run a float32 forward graph and report what its norms and layers met.

    Args:
        graph: Forward, float32.
        images: float32 [N, C, H, W] in [0, 1].
    """
    norms = [norm for norm in find_norms(graph) if _is_reported(graph, norm)]
    layers = layer_outputs(graph)
    wanted = {tensor for norm in norms for tensor in _tensors(graph, norm)} | {*layers.values()}
    module = GraphModule(graph)
    extremes = np.array([[0.0, np.inf, np.inf, 0.0]] * len(norms)).reshape(-1, 4)
    activations = dict.fromkeys(layers, 0.0)
    for at in range(0, len(images), BATCH):
        with torch.inference_mode():
            found = module.values(torch.from_numpy(images[at : at + BATCH]), wanted)
        values = {name: value.numpy() for name, value in found.items()}
        for row, norm in zip(extremes, norms, strict=True):
            summed, divisor, product = _met(graph, norm, values)
            row[:] = (
                max(row[0], summed.max()),
                min(row[1], summed[summed > 0].min(initial=np.inf)),
                min(row[2], divisor.min()),
                max(row[3], np.abs(product).max()),
            )
        for layer, tensor in layers.items():
            activations[layer] = max(activations[layer], float(np.abs(values[tensor]).max()))
    ranges = tuple(_range(norm, *row) for norm, row in zip(norms, extremes.tolist(), strict=True))
    return NumericReport(len(images), ranges, activations)


def _is_reported(graph: Graph, norm: Norm) -> bool:
    """Whether there is a sum of squares to look at."""
    return norm.kind != "softmax" and (bool(norm.summed) or _first(graph, norm).op in NORMALISED)


def _first(graph: Graph, norm: Norm) -> Node:
    return next(node for node in graph.nodes if node.name == norm.nodes[0])


def _tensors(graph: Graph, norm: Norm) -> tuple[str, ...]:
    """Return the names of the tensors that tell what a norm met."""
    if norm.summed:
        return tuple(t for t in (norm.summed, norm.divisor, norm.product) if t)
    return (_first(graph, norm).inputs[0],)


def _met(
    graph: Graph, norm: Norm, values: Mapping[str, NDArray[np.float32]]
) -> tuple[NDArray[np.float32], ...]:
    """Return the sums of squares, the divisors and what is divided."""
    if norm.summed:
        summed = values[norm.summed]
        if graph.made_by[norm.summed].op == "ReduceL2":
            summed = summed * summed
        divisor = values[norm.divisor] if norm.divisor else summed
        return summed, divisor, values[norm.product] if norm.product else np.zeros(1, np.float32)
    node = _first(graph, norm)
    return normalised(node, values[node.inputs[0]])


def _range(
    norm: Norm, largest: float, smallest: float, divisor: float, product: float
) -> LayerRange:
    smallest = 0.0 if np.isinf(smallest) else smallest
    return LayerRange(
        layer=norm.name,
        kind=norm.kind,
        largest_sum=largest,
        smallest_sum=smallest,
        headroom=FP16_LARGEST / largest if largest else FP16_LARGEST,
        floor_room=smallest / FP16_SMALLEST,
        smallest_divisor=divisor,
        largest_product=product,
    )
