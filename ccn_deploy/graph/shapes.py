"""Shapes of a graph's tensors, found by running it on two and on three images.

A size that differs between the two runs belongs to the batch. Integers that do not differ, and
that no pixel can reach, are shape arithmetic that a pass may fold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ccn_deploy.errors import GraphError
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph, Shape
from ccn_deploy.graph.signature import BATCH

_SHAPES_ONLY = ("Shape", "Size")
"""Operators whose result does not depend on what their input holds."""


@dataclass(frozen=True)
class Probe:
    """What two runs show.

    Attributes:
        shapes: Of every tensor, constants among them.
        fixed: Values of the integer and truth tensors that depend neither on images nor on the
            batch.
        floats: Names of the floating-point tensors that depend on the images, the images first.
    """

    shapes: Mapping[str, Shape]
    fixed: Mapping[str, NDArray[Any]]
    floats: frozenset[str]


def probe(graph: Graph) -> Probe:
    """Run a graph on two and on three images of noise, in float32 on the CPU.

    Raises:
        GraphError: It cannot be run, such as one that is made for one size of batch.
    """
    module = GraphModule(graph)
    two, three = (_run(module, batch) for batch in (2, 3))
    touched = reached_by_images(graph)
    shapes = {name: _shape(name, tensor, three[name]) for name, tensor in two.items()}
    fixed = {
        name: tensor.numpy()
        for name, tensor in two.items()
        if name not in touched
        and not tensor.is_floating_point()
        and torch.equal(tensor, three[name])
    }
    floats = frozenset(
        n for n, tensor in two.items() if n in touched and tensor.is_floating_point()
    )
    return Probe(shapes, fixed, floats)


def input_shapes(graph: Graph) -> dict[str, tuple[int | str, ...]]:
    """Return the sizes that a graph declares for what it is given; names for symbolic ones."""
    found = {}
    for value in graph.model.graph.input:
        if value.name in graph.inputs:
            dims = value.type.tensor_type.shape.dim
            found[value.name] = tuple(
                d.dim_value if d.dim_value > 0 else d.dim_param or "?"  # some write -1 for any size
                for d in dims
            )
    return found


def _run(module: GraphModule, batch: int) -> dict[str, Tensor]:
    graph = module.graph
    generator = np.random.default_rng(batch)
    given = []
    for name, shape in input_shapes(graph).items():
        # Symbolic sizes behind the batch (candidates) get a number that nothing else has.
        sizes = [batch if at == 0 else n if isinstance(n, int) else 5 for at, n in enumerate(shape)]
        if name == graph.inputs[0] and any(isinstance(n, str) for n in shape[1:]):
            raise GraphError(
                f"The input {name!r} has no fixed size: {list(shape)}.",
                "Say which size of image the network is to be deployed for.",
            )
        given.append(torch.from_numpy(generator.random(sizes, dtype=np.float32)))
    with torch.inference_mode():
        return module.values(given[0], None, *given[1:])


def reached_by_images(graph: Graph) -> set[str]:
    """Return the tensors that depend on what the graph is given, other than by its size."""
    touched = set(graph.inputs)
    for node in graph.nodes:
        if node.op not in _SHAPES_ONLY and not touched.isdisjoint(node.inputs):
            touched.update(name for name in node.outputs if name)
    return touched


def _shape(name: str, two: Tensor, three: Tensor) -> Shape:
    if two.dim() != three.dim():
        raise GraphError(
            f"The tensor {name!r} has {two.dim()} axes for two images and {three.dim()} for three.",
            "Export the network with one symbolic axis for the batch.",
        )
    return tuple(_size(a, b) for a, b in zip(two.shape, three.shape, strict=True))


def _size(two: int, three: int) -> int | str:
    if two == three:
        return two
    factor = three - two
    rest = two - 2 * factor
    name = BATCH if factor == 1 else f"{factor}*{BATCH}"
    return name if rest == 0 else f"{name}{rest:+d}"
