"""From a finished training run to a bundle."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import onnx
import torch

import ccn_deploy
from ccn_deploy.bundle import MANIFEST, Bundle, NewFile, write_bundle
from ccn_deploy.errors import UsageError, unknown
from ccn_deploy.exporters.checks import (
    check_gradient_graph,
    check_graph,
    check_optimized_graph,
    check_size,
)
from ccn_deploy.exporters.gradient import lower_gradient
from ccn_deploy.exporters.graph import IR_VERSION, OPSET, to_bytes
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.exporters.optimized import TARGETS, differs, lower_optimized
from ccn_deploy.exporters.probes import check_gradient_probe, check_probe
from ccn_deploy.runs import WEIGHTS, TrainedRun
from ccn_deploy.runtimes.torch_runtime import network_from

FORWARD = "graphs/forward-fp32.onnx"
"""Where a bundle keeps its float32 graph."""

GRADIENT = "graphs/gradient-fp32.onnx"
"""Where it keeps the graph of its input gradients."""

OPTIMIZED = "graphs/forward-fp32-{}.onnx"
"""Where it keeps a float32 graph that is written for one runtime."""

OURS = {"ccn-deploy": ccn_deploy.__version__}


def export_run(
    run: TrainedRun,
    output: str | os.PathLike[str],
    *,
    overwrite: bool = False,
    gradient: bool = True,
    optimize: str | None = None,
) -> Bundle:
    """Lower a run's network, check the graphs, and write the bundle.

    Args:
        run: From :func:`ccn_deploy.runs.open_run`.
        output: Directory to make.
        overwrite: Whether to replace a bundle that is there.
        gradient: Whether to add the graph of the input gradients, with which the deployed runtime
            can be attacked by itself. It holds the weights once more, convolutions twice.
        optimize: A runtime of :data:`~ccn_deploy.exporters.optimized.TARGETS` to write a forward
            graph for, beside the default one, which stays as it is. A network without compact
            layers has nothing to be written otherwise, and gets none.

    Raises:
        UsageError: ``output`` exists and may not be replaced, or there is no such lowering.
        IntegrityError: The weights do not belong to the architecture.
        LoweringError: The graph is not what it must be; nothing is written.
        StorageError: The disk is full or not writable; nothing half-written is left.
    """
    if optimize is not None and optimize not in TARGETS:
        raise unknown("lowering for a runtime", optimize, TARGETS)
    target = Path(output)
    _check_target(target, overwrite)
    model = network_from(run.architecture, run.defense, len(run.class_names), run.weights)
    files = [NewFile(WEIGHTS, run.weights, "weights", made_by=OURS)]

    check_size(model)
    forward = lower(model)
    check_graph(forward, model)
    check_probe(forward, model)
    files.append(_graph_file(FORWARD, forward, "forward"))
    if optimize is not None and differs(model):
        faster = lower_optimized(model)
        check_optimized_graph(faster, model)
        check_probe(faster, model)
        files.append(_graph_file(OPTIMIZED.format(optimize), faster, f"forward:{optimize}"))
    if gradient:
        check_size(model, gradient=True)
        backward = lower_gradient(model)
        check_gradient_graph(backward, forward, model)
        check_gradient_probe(backward, model)
        files.append(_graph_file(GRADIENT, backward, "gradient"))

    return write_bundle(
        target,
        architecture=run.architecture,
        defense=run.defense,
        input_shape=model.architecture.input_shape,
        class_names=run.class_names,
        training=run.training,
        files=files,
        overwrite=overwrite,
    )


def _graph_file(path: str, graph: onnx.ModelProto, role: str) -> NewFile:
    return NewFile(
        path,
        to_bytes(graph),
        role,
        "fp32",
        made_by={**OURS, "onnx": onnx.__version__, "torch": torch.__version__},
        details={"opset": OPSET, "ir_version": IR_VERSION, "ops": _count_ops(graph)},
    )


def _count_ops(graph: onnx.ModelProto) -> dict[str, int]:
    return dict(sorted(Counter(node.op_type for node in graph.graph.node).items()))


def _check_target(target: Path, overwrite: bool) -> None:
    """Refuse before the work is done, and never replace what is no bundle."""
    if not target.exists():
        return
    if not overwrite:
        raise UsageError(
            f"{target} exists already.",
            "Choose another --output, or add --overwrite to replace it.",
        )
    if not (target / MANIFEST).is_file():
        raise UsageError(
            f"{target} exists and is no bundle: it has no {MANIFEST}, so it is not replaced.",
            "Choose another --output, or remove it yourself.",
        )
