"""Finding the ranges of activations on real images, with ONNX Runtime's calibrators."""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from ccn_deploy.errors import LoweringError, unknown
from ccn_deploy.extras import require
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import INPUT

METHODS = ("min-max", "entropy", "percentile")
"""Ways from values seen to a range; see ``docs/precision.md``."""

PERCENTILE = 99.99
"""Percentage of absolute values that the method ``percentile`` keeps in range."""

BATCH = 16
"""Images that are run at once; what they activate is held in memory."""


@dataclass(frozen=True)
class Calibration:
    """Images to find ranges on.

    Attributes:
        images: float32 [N, C, H, W] in [0, 1]; of the training split.
        method: One of :data:`METHODS`.
        document: Where the images come from, as it stands in the manifest: data set, digest,
            samples, seed.
    """

    images: NDArray[np.float32]
    method: str = "min-max"
    document: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.method not in METHODS:
            raise unknown("calibration method", self.method, METHODS)


def ranges(graph: Graph, tensors: Mapping[str, str], calibration: Calibration) -> dict[str, float]:
    """Return, for each tensor, the largest absolute value to represent.

    Args:
        graph: Forward, float32.
        tensors: The tensors, each with the name of what reads it, for messages.
        calibration: Images and method.

    Raises:
        MissingExtraError: ONNX Runtime is not installed.
        LoweringError: A tensor is zero on every image, or not finite.
    """
    library = require("onnxruntime.quantization.calibrate", "cpu", "to calibrate")
    method, options = {
        "min-max": (library.CalibrationMethod.MinMax, {}),
        "entropy": (library.CalibrationMethod.Entropy, {}),
        "percentile": (library.CalibrationMethod.Percentile, {"percentile": PERCENTILE}),
    }[calibration.method]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "graph.onnx"
        path.write_bytes(_watched(graph.model, tensors).SerializeToString())
        calibrator = library.create_calibrator(
            path,
            op_types_to_calibrate=["Identity"],
            augmented_model_path=str(Path(folder) / "watched.onnx"),
            calibrate_method=method,
            extra_options={"symmetric": True, **options},
        )
        with contextlib.redirect_stdout(io.StringIO()):  # stdout is for results
            for at in range(0, len(calibration.images), BATCH):
                calibrator.collect_data(_Reader(calibration.images[at : at + BATCH]))
            found = calibrator.compute_data()
    limits = {}
    for tensor, reader in tensors.items():
        low, high = (float(np.asarray(end).item()) for end in found[tensor].range_value)
        limit = max(-low, high)
        if not 0 < limit < np.inf:
            raise LoweringError(
                f"The input of layer {reader!r} has no range to quantise on these images: {limit}.",
                f"Calibrate on real images of the training set, or add --keep-fp32 {reader}.",
            )
        limits[tensor] = limit
    return limits


def _watched(graph: onnx.ModelProto, tensors: Iterable[str]) -> onnx.ModelProto:
    """Return a copy in which only the tensors of interest meet the op that is calibrated."""
    copy = onnx.ModelProto()
    copy.CopyFrom(graph)
    for tensor in tensors:
        copy.graph.node.append(
            onnx.helper.make_node("Identity", [tensor], [f"{tensor}.seen"], f"{tensor}.seen")
        )
        copy.graph.output.append(
            onnx.helper.make_tensor_value_info(f"{tensor}.seen", onnx.TensorProto.FLOAT, None)
        )
    return copy


class _Reader:
    """One batch, in the form that the calibrators read."""

    def __init__(self, images: NDArray[np.float32]) -> None:
        self._ahead = iter([{INPUT: images}])

    def get_next(self) -> dict[str, NDArray[np.float32]] | None:
        return next(self._ahead, None)
