"""The graphs of a bundle: lowered from the network, checked, and converted to other precisions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import onnx
import torch

from ccn_deploy.bundle import Lineage, NewFile
from ccn_deploy.exporters.bundle_draft import OURS
from ccn_deploy.exporters.checks import (
    check_gradient_graph,
    check_graph,
    check_optimized_graph,
    check_size,
)
from ccn_deploy.exporters.gradient import lower_gradient
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.optimized import lower_optimized
from ccn_deploy.exporters.precision import (
    Calibration,
    NumericReport,
    check_precision,
    convert,
)
from ccn_deploy.exporters.reference_check import check_gradient_probe, check_probe
from ccn_deploy.graph.builder import IR_VERSION, OPSET, to_bytes
from ccn_deploy.models import Classifier
from ccn_deploy.runs import WEIGHTS
from ccn_deploy.targets import PRECISIONS, Role


def path_of(role: Role, precision: str, runtime: str = "") -> str:
    """Return where a bundle keeps a graph: ``graphs/forward-fp32.onnx``."""
    return f"graphs/{role}-{precision}{f'-{runtime}' if runtime else ''}.onnx"


def forward_graph(model: Classifier) -> NewFile:
    """Lower a network and check the graph.

    Raises:
        LoweringError: It is not what it must be.
    """
    check_size(model)
    graph = lower(model)
    check_graph(graph, model)
    check_probe(graph, model)
    return _file(Role.FORWARD, graph, Lineage(sources=(WEIGHTS,), step="lower"))


def optimized_graph(model: Classifier, runtime: str) -> NewFile:
    """Lower a network for one runtime and check the graph.

    Raises:
        LoweringError: It is not what it must be.
    """
    graph = lower_optimized(model)
    check_optimized_graph(graph, model)
    check_probe(graph, model)
    lineage = Lineage(sources=(WEIGHTS,), step="optimize")
    return _file(Role.FORWARD, graph, lineage, runtime=runtime)


def gradient_graph(model: Classifier, forward: NewFile) -> NewFile:
    """Lower the input gradients of a network and check the graph.

    Raises:
        LoweringError: It is not what it must be.
    """
    check_size(model, gradient=True)
    graph = lower_gradient(model)
    check_gradient_graph(graph, onnx.load_model_from_string(forward.data), model)
    check_gradient_probe(graph, model)
    return _file(Role.GRADIENT, graph, Lineage(sources=(WEIGHTS,), step="vjp"))


def converted_graph(
    source: NewFile,
    precision: str,
    model: Classifier,
    calibration: Calibration | None,
    report: NumericReport | None,
) -> NewFile:
    """Convert a float32 graph and check the structural rule of its precision.

    Args:
        source: The float32 graph, forward or gradient.
        precision: One of :data:`ccn_deploy.exporters.precision.PRECISIONS`.
        model: The network.
        calibration: Images, for precisions that need them.
        report: What the norm branches met, for the manifest.

    Raises:
        UsageError: The precision needs a calibration and there is none.
        LoweringError: The converted graph breaks the rule.
    """
    converted = convert(onnx.load_model_from_string(source.data), precision, calibration)
    check_precision(converted.graph, precision, model)
    details: dict[str, Any] = {"layers": converted.layers}
    if converted.calibration is not None:
        details["calibration"] = converted.calibration
    if report is not None:
        details["numeric"] = report.document()
    step = "cast" if PRECISIONS[precision].kind == "half" else "qdq"
    lineage = Lineage(sources=(source.path,), step=step)
    return _file(source.role, converted.graph, lineage, precision, details=details)


def _file(
    role: Role,
    graph: onnx.ModelProto,
    lineage: Lineage,
    precision: str = "fp32",
    *,
    runtime: str = "",
    details: Mapping[str, Any] | None = None,
) -> NewFile:
    ops = Counter(node.op_type for node in graph.graph.node)
    return NewFile(
        path_of(role, precision, runtime),
        to_bytes(graph),
        role,
        precision,
        runtime,
        lineage,
        made_by={**OURS, "onnx": onnx.__version__, "torch": str(torch.__version__)},
        details={
            "opset": OPSET,
            "ir_version": IR_VERSION,
            "ops": dict(sorted(ops.items())),
            **(details or {}),
        },
    )
