"""The graphs of a bundle: lowered from the network, checked, and converted to other precisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import onnx
import torch

from ccn_deploy.bundle import NewFile
from ccn_deploy.exporters.bundle_draft import OURS
from ccn_deploy.exporters.checks import (
    check_gradient_graph,
    check_graph,
    check_size,
)
from ccn_deploy.exporters.gradient import lower_gradient
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.optimized import check_optimized, optimize
from ccn_deploy.exporters.precision import (
    Calibration,
    NumericReport,
    check_precision,
    convert,
)
from ccn_deploy.exporters.reference_check import check_gradient_probe, check_probe
from ccn_deploy.graph.builder import IR_VERSION, OPSET, to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.models import Classifier


def path_of(role: str, precision: str) -> str:
    """Return where a bundle keeps a graph: ``graphs/forward-fp32.onnx``."""
    kind, _, runtime = role.partition(":")
    return f"graphs/{kind}-{precision}{f'-{runtime}' if runtime else ''}.onnx"


def forward_graph(model: Classifier) -> NewFile:
    """Lower a network and check the graph.

    Raises:
        LoweringError: It is not what it must be.
    """
    check_size(model)
    graph = lower(model)
    check_graph(graph, model)
    check_probe(graph, model)
    return _file("forward", graph)


def optimized_graph(forward: NewFile, runtime: str) -> NewFile:
    """Rewrite a forward graph for one runtime and check the result.

    Raises:
        LoweringError: It is not what it must be.
    """
    source = as_graph(forward)
    graph = optimize(source)
    check_optimized(graph, source)
    return _file(f"forward:{runtime}", graph)


def gradient_graph(model: Classifier, forward: NewFile) -> NewFile:
    """Lower the input gradients of a network and check the graph.

    Raises:
        LoweringError: It is not what it must be.
    """
    check_size(model, gradient=True)
    graph = lower_gradient(model)
    check_gradient_graph(graph, onnx.load_model_from_string(forward.data), model)
    check_gradient_probe(graph, model)
    return _file("gradient", graph)


def converted_graph(
    source: NewFile,
    precision: str,
    calibration: Calibration | None,
    report: NumericReport | None,
    keep_fp32: Sequence[str] = (),
) -> NewFile:
    """Convert a float32 graph and check the structural rule of its precision.

    Args:
        source: The float32 graph, forward or gradient.
        precision: One of :data:`ccn_deploy.exporters.precision.PRECISIONS`.
        calibration: Images, for precisions that need them.
        report: What norms and layers met, for the manifest.
        keep_fp32: Nodes, or what their names begin with, that stay float32.

    Raises:
        UsageError: The precision needs a calibration and there is none.
        LoweringError: The converted graph breaks the rule.
    """
    converted = convert(as_graph(source), precision, calibration, keep_fp32)
    check_precision(converted.graph, precision, keep_fp32)
    details: dict[str, Any] = {"layers": converted.layers}
    if converted.calibration is not None:
        details["calibration"] = converted.calibration
    if report is not None:
        details["numeric"] = report.document()
    return _file(source.role, converted.graph, precision, details)


def as_graph(source: NewFile) -> Graph:
    """Return the graph of a file that was written here."""
    return Graph(onnx.load_model_from_string(source.data))


def _file(
    role: str,
    graph: onnx.ModelProto,
    precision: str = "fp32",
    details: Mapping[str, Any] | None = None,
) -> NewFile:
    ops = Counter(node.op_type for node in graph.graph.node)
    return NewFile(
        path_of(role, precision),
        to_bytes(graph),
        role,
        precision,
        made_by={**OURS, "onnx": onnx.__version__, "torch": torch.__version__},
        details={
            "opset": OPSET,
            "ir_version": IR_VERSION,
            "ops": dict(sorted(ops.items())),
            **(details or {}),
        },
    )
