"""The proof that a forward graph is the module it came from: both in float64, same images."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ccn_deploy.errors import LoweringError, UsageError
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph

AGREEMENT = 1e-5
"""Largest figure that passes. Where weights were folded, alpha or batch normalisation into a
convolution, the graph holds their product rounded to float32, which moves logits by about 1e-7 of
the largest; where nothing was folded the figure is about 1e-12, but for deltas and other numbers
that the graph holds in float32."""

_BATCH = 32
_NOISE = 8


def agreement(
    module: nn.Module, model: onnx.ModelProto, images: NDArray[np.float32] | None = None
) -> dict[str, float]:
    """Measure in float64 how far a module and its forward graph differ.

    Args:
        module: A copy of it is used, in evaluation mode.
        model: From :func:`ccn_deploy.exporters.sources.module.export_module`.
        images: float32 [N, C, H, W] in [0, 1], real ones if there are any.

    Returns:
        For ``"noise"``, ``"constant"`` (black, grey and white images) and, if given,
        ``"images"``: the largest difference of a logit over the largest logit.

    Raises:
        UsageError: The module does not run in float64.
    """
    graph = Graph(model)
    program = GraphModule(graph, torch.float64)
    reference = copy.deepcopy(module).to("cpu", torch.float64).eval()
    figures: dict[str, float] = {}
    with torch.no_grad():
        for name, batch in _batches(graph.input_shape, images):
            figure = _difference(reference, program, batch)
            figures[name] = max(figures.get(name, 0.0), figure)
    return figures


def check_agreement(
    module: nn.Module, model: onnx.ModelProto, images: NDArray[np.float32] | None = None
) -> dict[str, float]:
    """Return :func:`agreement`, if every figure is within :data:`AGREEMENT`.

    Raises:
        LoweringError: One is not.
        UsageError: As :func:`agreement` raises.
    """
    figures = agreement(module, model, images)
    for name, figure in figures.items():
        if not figure <= AGREEMENT:
            raise LoweringError(
                f"The exported graph and the module differ by {figure:.1e} of the largest logit "
                f"on {name}; {AGREEMENT:.0e} is allowed.",
                "Something in the module is exported as another function; please report it.",
            )
    return figures


def _batches(
    shape: tuple[int, int, int], images: NDArray[np.float32] | None
) -> Iterator[tuple[str, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    yield "noise", torch.rand(_NOISE, *shape, generator=generator, dtype=torch.float64)
    levels = torch.tensor([0.0, 0.5, 1.0], dtype=torch.float64)
    yield "constant", levels.view(-1, 1, 1, 1).expand(-1, *shape).contiguous()
    for start in range(0, 0 if images is None else len(images), _BATCH):
        assert images is not None
        yield "images", torch.from_numpy(images[start : start + _BATCH]).double()


def _difference(reference: nn.Module, program: GraphModule, images: Tensor) -> float:
    try:
        expected = reference(images).double()
    except RuntimeError as error:
        raise UsageError(
            f"The module does not run in float64: {str(error).splitlines()[0]}",
            "Let it follow the type of its input (x.dtype) where it makes tensors of its own.",
        ) from error
    if not bool(expected.isfinite().all()):
        raise LoweringError(
            "The network itself gives logits that are not finite.",
            "Train it again, or look for NaN in its weights.",
        )
    scale = max(float(expected.abs().max()), 1e-30)
    return float((program(images) - expected).abs().max()) / scale
