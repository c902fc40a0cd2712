"""From a finished training run to a bundle."""

from __future__ import annotations

import os
from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx.reference import ReferenceEvaluator

import ccn_deploy
from ccn_deploy.bundle import MANIFEST, Bundle, NewFile, write_bundle
from ccn_deploy.errors import LoweringError, UsageError
from ccn_deploy.exporters.checks import check_graph, check_size
from ccn_deploy.exporters.graph import INPUT, IR_VERSION, OPSET, OUTPUT, to_bytes
from ccn_deploy.exporters.lowering import lower
from ccn_deploy.models import Classifier
from ccn_deploy.runs import WEIGHTS, TrainedRun
from ccn_deploy.runtimes.torch_runtime import network_from

FORWARD = "graphs/forward-fp32.onnx"
"""Where a bundle keeps its float32 graph."""

PROBE_TOLERANCE = 1e-3
"""Allowed error of the probe, relative to the largest logit: a slip in the lowering is orders of
magnitude larger, float32 rounding orders smaller. `verify-parity` measures the real error."""


def export_run(
    run: TrainedRun, output: str | os.PathLike[str], *, overwrite: bool = False
) -> Bundle:
    """Lower a run's network, check the graph, and write the bundle.

    Args:
        run: From :func:`ccn_deploy.runs.open_run`.
        output: Directory to make.
        overwrite: Whether to replace a bundle that is there.

    Raises:
        UsageError: ``output`` exists and may not be replaced.
        IntegrityError: The weights do not belong to the architecture.
        LoweringError: The graph is not what it must be; nothing is written.
        StorageError: The disk is full or not writable; nothing half-written is left.
    """
    target = Path(output)
    _check_target(target, overwrite)
    model = network_from(run.architecture, run.defense, len(run.class_names), run.weights)
    check_size(model)
    graph = lower(model)
    check_graph(graph, model)
    check_probe(graph, model)

    ours = {"ccn-deploy": ccn_deploy.__version__}
    return write_bundle(
        target,
        architecture=run.architecture,
        defense=run.defense,
        input_shape=model.architecture.input_shape,
        class_names=run.class_names,
        training=run.training,
        files=[
            NewFile(WEIGHTS, run.weights, "weights", made_by=ours),
            NewFile(
                FORWARD,
                to_bytes(graph),
                "forward",
                "fp32",
                made_by={**ours, "onnx": onnx.__version__, "torch": torch.__version__},
                details={"opset": OPSET, "ir_version": IR_VERSION, "ops": _count_ops(graph)},
            ),
        ],
        overwrite=overwrite,
    )


def check_probe(graph: onnx.ModelProto, model: Classifier) -> None:
    """Evaluate the graph once, by ONNX's own definition of its ops, beside the network.

    Two images, one of noise and one constant. A probe, not a proof: it keeps a graph that
    computes something else from ever being written.

    Raises:
        LoweringError: Logits that are not finite or not the network's.
    """
    shape = (1, *model.architecture.input_shape)
    noise = np.random.default_rng(0).random(shape, dtype=np.float32)
    images = np.concatenate([noise, np.full(shape, 0.5, dtype=np.float32)])
    with torch.inference_mode():
        wanted = model(torch.from_numpy(images)).numpy()
    (got,) = ReferenceEvaluator(graph).run([OUTPUT], {INPUT: images})
    if not np.isfinite(wanted).all():
        raise LoweringError(
            "The trained network itself gives logits that are not finite.", "Train it again."
        )
    error = np.abs(got - wanted).max() / np.abs(wanted).max()
    if not error < PROBE_TOLERANCE:
        raise LoweringError(
            f"The graph is off by {error:.1e} of the largest logit from the network it was made "
            "from.",
            "Nothing was written; this is a bug in the exporter, please report it.",
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
