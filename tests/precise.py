"""Bundles with a graph in another precision, beside the float32 one they come with."""

from __future__ import annotations

from pathlib import Path

import onnx

from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.data import load_dataset
from ccn_deploy.exporters.precision import Calibration, convert
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.targets import Role

SAMPLES = 128


def digits(method: str = "min-max") -> Calibration:
    """Return a calibration on training images of mnist5k."""
    data = load_dataset("mnist5k", "train")
    chosen = data.order(0)[:SAMPLES]
    return Calibration(data.images(chosen), method, {"dataset": data.name, "samples": SAMPLES})


def forward_graph(bundle: Bundle, precision: str = "fp32") -> onnx.ModelProto:
    return onnx.load_model_from_string(bundle.read(bundle.file(Role.FORWARD, precision)))


def with_precision(
    bundle: Bundle,
    output: Path,
    precision: str,
    calibration: Calibration | None = None,
    *,
    gradient: bool = False,
) -> Bundle:
    """Write a copy of a bundle with one more forward graph, and one more gradient graph."""
    converted = convert(forward_graph(bundle), precision, calibration)
    details = {"layers": converted.layers}
    if converted.calibration is not None:
        details["calibration"] = converted.calibration
    path = f"graphs/forward-{precision}.onnx"
    graph = NewFile(path, to_bytes(converted.graph), Role.FORWARD, precision, details=details)
    graphs = [graph]
    if gradient:
        slopes = onnx.load_model_from_string(bundle.read(bundle.file(Role.GRADIENT, "fp32")))
        path = f"graphs/gradient-{precision}.onnx"
        data = to_bytes(convert(slopes, precision).graph)
        graphs.append(NewFile(path, data, Role.GRADIENT, precision))
    return write_bundle(
        output,
        card=bundle.card,
        files=[*(NewFile.copy(bundle, record) for record in bundle.manifest.files), *graphs],
    )
