"""What must be true of a graph before it is written into a bundle."""

from __future__ import annotations

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import shape_inference

from ccn_deploy.errors import LoweringError
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import GRADIENTS, INPUT, OUTPUT

LARGEST = 2**31 - 1
"""Bytes that a protobuf message may have."""

TOLERANCE = 1e-3
"""Allowed error of gradients in float64, over the largest slope. A wrong rule is orders of
magnitude larger; the floor under the norm of empty patches is smaller."""

CANDIDATES_PROBED = 2

HINT = "Nothing was written; this is a bug in the exporter, please report it."


def check_size(graph: onnx.ModelProto, what: str, hint: str) -> None:
    """Refuse a graph that does not fit into one ONNX file.

    Args:
        graph: A graph with its constants.
        what: Names it in the error: ``"The gradient graph"``.
        hint: What to do about it.

    Raises:
        LoweringError: It is larger than protobuf's limit of 2 GiB.
    """
    size = sum(len(constant.raw_data) for constant in graph.graph.initializer)
    if size > LARGEST - 2**20:  # a mebibyte for names and nodes
        raise LoweringError(
            f"{what} has {size / 2**30:.1f} GiB of weights; an ONNX file holds at most 2 GiB.", hint
        )


def check_valid(graph: onnx.ModelProto) -> None:
    """Run the ONNX checker in full.

    Raises:
        LoweringError: The checker complains.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        text = " ".join(str(error).split())[:300]
        raise LoweringError(f"The ONNX checker refuses the graph: {text}", HINT) from error


def check_plain(graph: onnx.ModelProto) -> None:
    """Assert that the file says nothing but the function: no doc strings, metadata or paths.

    Raises:
        LoweringError: Something else is in it.
    """
    body = graph.graph
    described = [graph, body, *body.node, *body.input, *body.output, *body.initializer]
    stray = [part for part in described if part.doc_string or part.metadata_props]
    external = [c.name for c in body.initializer if c.external_data]
    if stray or external or body.value_info or graph.functions or graph.producer_version:
        raise LoweringError("The graph carries text beside its function.", HINT)


def check_forward(graph: Graph) -> None:
    """Assert that a graph maps images to logits that are numbers.

    Raises:
        LoweringError: Other inputs or outputs than those of a forward graph, logits that are not
            [batch, classes], or not finite on noise and on a constant image.
    """
    if (graph.inputs, graph.outputs) != ((INPUT,), (OUTPUT,)):
        raise LoweringError(
            f"The graph maps {', '.join(graph.inputs)} to {', '.join(graph.outputs)}.", HINT
        )
    shape = graph.shapes[OUTPUT]
    if len(shape) != 2 or isinstance(shape[0], int) or not isinstance(shape[1], int):
        raise LoweringError(f"The logits have shape {list(shape)}, not [batch, classes].", HINT)
    with torch.inference_mode():
        logits = GraphModule(graph)(torch.from_numpy(probes(graph.input_shape)))
    if not logits.isfinite().all():
        raise LoweringError(
            "The network gives logits that are not finite.",
            "Nothing was written. Train it again, or look for NaN in its weights.",
        )


def check_gradient(gradient: onnx.ModelProto, forward: Graph) -> None:
    """Evaluate a gradient graph in float64 beside autograd through the forward graph.

    In float32, rounding turns activations on or off and chooses other maxima, which moves the
    gradient of some networks by a tenth; in float64 it does not, so that what differs is wrong.
    On a constant image, where windows tie and patches may be zero, gradients must be finite.

    Raises:
        LoweringError: Logits or gradients that are not those of the forward graph.
    """
    check_valid(gradient)
    check_plain(gradient)
    images = torch.from_numpy(probes(forward.input_shape)).double()
    network = GraphModule(forward, torch.float64)
    leaf = images.clone().requires_grad_(True)
    logits = network(leaf)
    generator = torch.Generator().manual_seed(1)
    shape = (len(images), CANDIDATES_PROBED, logits.shape[1])
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = cotangents.unbind(1)
    wanted = torch.stack(
        [torch.autograd.grad(logits, leaf, row, retain_graph=True)[0] for row in rows], 1
    )
    with torch.inference_mode():
        derived = GraphModule(Graph(gradient), torch.float64)
        found = derived.values(images, (OUTPUT, GRADIENTS), cotangents)
    if not found[GRADIENTS].isfinite().all():
        raise LoweringError("The gradient graph gives gradients that are not finite.", HINT)
    # On the noise image alone: in float64 too, ties of a constant one are broken by rounding.
    for what, got, truth in (
        ("logits", found[OUTPUT], logits.detach()),
        ("gradients", found[GRADIENTS], wanted),
    ):
        error = float((got[0] - truth[0]).abs().max() / truth[0].abs().max().clamp(min=1e-30))
        if not error < TOLERANCE:
            raise LoweringError(
                f"The gradient graph's {what} are off by {error:.1e} of the largest from those of "
                "the forward graph.",
                HINT,
            )


def probes(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return an image of noise and a constant one, all-zero after a mean of 0.5: [2, C, H, W]."""
    noise = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    return np.concatenate([noise, np.full((1, *shape), 0.5, dtype=np.float32)])
