"""The graphs of a bundle: the forward graph of a source, and what is derived from it, checked."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any

import onnx
import torch

import ccn_deploy
from ccn_deploy.bundle import Lineage, NewFile
from ccn_deploy.errors import GraphError, IntegrityError
from ccn_deploy.exporters.canonical import CanonicalGraph, canonical
from ccn_deploy.exporters.checks import check_forward, check_gradient, check_size
from ccn_deploy.exporters.optimized import check_optimized, differs, optimize
from ccn_deploy.exporters.precision import Calibration, NumericReport, check_precision, convert
from ccn_deploy.exporters.vjp import gradient_graph
from ccn_deploy.graph.builder import to_bytes
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.reader import read_graph
from ccn_deploy.graph.signature import COTANGENTS
from ccn_deploy.targets import PRECISIONS, Role

OURS = {"ccn-deploy": ccn_deploy.__version__}


class GraphFile:
    """A float32 graph of a bundle, read and made canonical once for all passes.

    Args:
        file: Of the bundle.
    """

    def __init__(self, file: NewFile) -> None:
        self.file = file

    @cached_property
    def graph(self) -> Graph:
        """The graph as it is deployed; see :func:`graph_of`."""
        return graph_of(self.file)

    @cached_property
    def canonical(self) -> CanonicalGraph:
        """The form of a forward graph that passes start from."""
        return canonical(self.graph)


def path_of(role: Role, precision: str, runtime: str = "") -> str:
    """Return where a bundle keeps a graph: ``graphs/forward-fp32.onnx``."""
    return f"graphs/{role}-{precision}{f'-{runtime}' if runtime else ''}.onnx"


def forward_file(forward: Graph, sources: tuple[str, ...]) -> NewFile:
    """Check a forward graph and make a file of it, its nodes as they are.

    Args:
        forward: From a source.
        sources: Paths in the bundle of what it was made of; empty if it came from outside.

    Raises:
        LoweringError: It is not what it must be.
    """
    check_size(forward.model, "The network", "Choose a smaller network.")
    check_forward(forward)
    step = "lower" if sources else "take-in"
    return _file(Role.FORWARD, forward.model, Lineage(sources=sources, step=step))


def optimized_file(forward: GraphFile, runtime: str) -> NewFile | None:
    """Rewrite a forward graph for one runtime and check it; None where nothing is to be rewritten.

    Raises:
        LoweringError: It is not what it must be.
    """
    source = forward.canonical
    if not differs(source):
        return None
    graph = optimize(source)
    check_optimized(graph, source)
    lineage = Lineage(sources=(forward.file.path,), step="optimize", settings={"runtime": runtime})
    return _file(Role.FORWARD, graph, lineage, runtime=runtime)


def gradient_file(forward: GraphFile) -> NewFile:
    """Derive the graph of the input gradients and check it.

    Raises:
        NoGradientError: An operator has no rule; names it with its node.
        LoweringError: It is not what it must be.
    """
    graph = gradient_graph(forward.canonical)
    check_size(graph, "The gradient graph", "Export without it: --no-gradient")
    check_gradient(graph, forward.graph)
    return _file(Role.GRADIENT, graph, Lineage(sources=(forward.file.path,), step="vjp"))


def converted_file(
    source: GraphFile,
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
        UsageError: The precision needs a calibration and there is none, or a name that no node
            has.
        LoweringError: The converted graph breaks the rule.
    """
    differentiates = COTANGENTS in source.graph.inputs
    graph = source.graph if differentiates else source.canonical
    converted = convert(graph, precision, calibration, keep_fp32)
    check_precision(converted.graph, precision, keep_fp32)
    details: dict[str, Any] = {"layers": converted.layers}
    if converted.calibration is not None:
        details["calibration"] = converted.calibration
    if report is not None:
        details["numeric"] = report.document()
    step = "cast" if PRECISIONS[precision].kind == "half" else "qdq"
    settings = {"precision": precision, "keep_fp32": list(keep_fp32)}
    lineage = Lineage(sources=(source.file.path,), step=step, settings=settings)
    return _file(source.file.role, converted.graph, lineage, precision, details=details)


def graph_of(source: NewFile) -> Graph:
    """Read a graph of a bundle, which may be anybody's, as safely as a foreign file.

    Raises:
        IntegrityError: It is none, or has what no exporter of this package writes.
    """
    try:
        return read_graph(source.data, source.path)
    except GraphError as error:
        raise IntegrityError(error.what, "Export the network again; nothing was used.") from error


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
            "opset": Graph(graph).opset,
            "ir_version": graph.ir_version,
            "ops": dict(sorted(ops.items())),
            **(details or {}),
        },
    )
