"""One function from a float32 graph to another precision."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import onnx

from ccn_deploy.errors import UsageError, unknown
from ccn_deploy.exporters.precision.calibration import Calibration, ranges
from ccn_deploy.exporters.precision.cast import half_layers, to_half
from ccn_deploy.exporters.precision.formats import GRIDS, HALVES
from ccn_deploy.exporters.precision.qdq import quantized_layers, to_grid
from ccn_deploy.graph.signature import COTANGENTS

PRECISIONS = (*HALVES, *GRIDS)
"""What a forward graph can be converted to."""

GRADIENTS = tuple(HALVES)
"""What a gradient graph can be converted to: rounding to a grid has slope zero almost everywhere,
so a quantised network has no gradient worth following."""


@dataclass(frozen=True)
class Converted:
    """A graph in another precision.

    Attributes:
        graph: Its inputs and outputs are still float32.
        layers: For each layer its ``"compute"`` and, if compact, its ``"norm"`` precision.
        calibration: How the ranges of activations were found, and what they are; None in a
            precision that needs none.
    """

    graph: onnx.ModelProto
    layers: dict[str, dict[str, str]]
    calibration: dict[str, Any] | None = None


def convert(
    graph: onnx.ModelProto, precision: str, calibration: Calibration | None = None
) -> Converted:
    """Convert a float32 graph.

    The same graph and calibration give the same bytes.

    Args:
        graph: Of :func:`~ccn_deploy.exporters.lowering.lower`; for fp16 and bf16 also of
            :func:`~ccn_deploy.exporters.gradient.lower_gradient`. It is not changed.
        precision: One of :data:`PRECISIONS`.
        calibration: Images to find the ranges of activations on; int8 and fp8 need them.

    Raises:
        UsageError: An unknown precision, one that needs a calibration and has none, or one that
            a gradient graph cannot have.
        LoweringError: A weight overflows fp16, or a layer's input has no range.
        MissingExtraError: ONNX Runtime is needed to calibrate and is not installed.
    """
    if precision not in PRECISIONS:
        raise unknown("precision", precision, PRECISIONS)
    if precision in HALVES:
        return Converted(to_half(graph, HALVES[precision]), half_layers(graph, precision))
    if any(value.name == COTANGENTS for value in graph.graph.input):
        raise UsageError(
            f"There is no gradient graph in {precision}: rounding to a grid has slope zero.",
            "Attack it with gradients of the reference: --gradient reference.",
        )
    if calibration is None:
        raise UsageError(
            f"{precision} needs images to find the ranges of activations on.",
            "Give --dataset, or export a run that knows its data set.",
        )
    found = ranges(graph, calibration)
    return Converted(
        to_grid(graph, GRIDS[precision], found),
        quantized_layers(graph, precision),
        {**calibration.document, "method": calibration.method, "ranges": found},
    )
