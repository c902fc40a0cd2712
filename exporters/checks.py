"""What must be true of a graph before it is written into a bundle."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import shape_inference

from ccn_deploy.errors import GraphError, LoweringError, one_line
from ccn_deploy.graph.evaluate import GraphModule
from ccn_deploy.graph.graph import Graph
from ccn_deploy.graph.signature import BATCH, CANDIDATES, COTANGENTS, GRADIENTS, INPUT, OUTPUT

LARGEST = 2**31 - 1
"""Bytes that a protobuf message may have."""

EXACT = 1e-5
"""Allowed difference in float64 of two graphs of one network, over the largest value. A gradient
graph rounds factors of its own to float32, such as one over the deviation of every batch
normalisation: over the fifty of a ResNet-50 that is 1.2e-6. A wrong rule is orders above."""

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
    """Run the ONNX checker in full, and assert that the graph says nothing but its function.

    Raises:
        LoweringError: The checker complains; or there are doc strings, metadata or paths.
    """
    try:
        onnx.checker.check_model(graph, full_check=True)
    except (onnx.checker.ValidationError, shape_inference.InferenceError) as error:
        what = f"The ONNX checker refuses the graph: {one_line(error)}"
        raise LoweringError(what, HINT) from error
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
    images, logits = (BATCH, *graph.input_shape), (BATCH, graph.classes)
    _check_declared(graph.model, {INPUT: images, OUTPUT: logits})
    with torch.inference_mode():
        found = GraphModule(graph)(torch.from_numpy(probes(graph.input_shape)))
    if not found.isfinite().all():
        raise LoweringError(
            "The network gives logits that are not finite.",
            "Nothing was written. Train it again, or look for NaN in its weights.",
        )


def _check_declared(graph: onnx.ModelProto, wanted: Mapping[str, tuple[int | str, ...]]) -> None:
    """Assert the shapes of a graph's inputs and outputs, symbolic sizes by their names."""
    declared = {
        value.name: tuple(d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim)
        for value in (*graph.graph.input, *graph.graph.output)
    }
    if declared != wanted:
        raise LoweringError(f"The graph declares {declared}, not {dict(wanted)}.", HINT)


def check_gradient(gradient: onnx.ModelProto, forward: Graph) -> None:
    """Evaluate a gradient graph in float64 beside autograd through the forward graph.

    In float32, rounding turns activations on or off and chooses other maxima, which moves the
    gradient of some networks by a tenth; in float64 it does not, so that what differs is wrong.
    On a constant image, where windows tie and patches may be zero, gradients must be finite.

    Raises:
        LoweringError: Logits or gradients that are not those of the forward graph.
    """
    check_valid(gradient)
    image, classes = forward.input_shape, forward.classes
    _check_declared(
        gradient,
        {
            INPUT: (BATCH, *image),
            COTANGENTS: (BATCH, CANDIDATES, classes),
            OUTPUT: (BATCH, classes),
            GRADIENTS: (BATCH, CANDIDATES, *image),
        },
    )
    images = torch.from_numpy(probes(image)).double()
    network = GraphModule(forward, torch.float64)
    leaf = images.clone().requires_grad_(True)
    logits = network(leaf)
    generator = torch.Generator().manual_seed(1)
    shape = (len(images), CANDIDATES_PROBED, classes)
    cotangents = torch.randn(shape, generator=generator, dtype=torch.float64)
    rows = cotangents.unbind(1)
    wanted = torch.stack(
        [torch.autograd.grad(logits, leaf, row, retain_graph=True)[0] for row in rows], 1
    )
    try:
        with torch.inference_mode():
            derived = GraphModule(Graph(gradient), torch.float64)
            found = derived.values(images, (OUTPUT, GRADIENTS), cotangents)
    except GraphError as error:
        raise LoweringError(f"The gradient graph: {error.what}", HINT) from error
    if not found[GRADIENTS].isfinite().all():
        raise LoweringError("The gradient graph gives gradients that are not finite.", HINT)
    # On the noise image alone: in float64 too, ties of a constant one are broken by rounding.
    for what, got, truth in (
        ("logits", found[OUTPUT], logits.detach()),
        ("gradients", found[GRADIENTS], wanted),
    ):
        off = float((got[0] - truth[0]).abs().max() / truth[0].abs().max().clamp(min=1e-30))
        if not off < EXACT:
            raise LoweringError(
                f"The gradient graph's {what} are off by {off:.1e} of the largest from those of "
                "the forward graph.",
                HINT,
            )


def probes(shape: tuple[int, int, int]) -> NDArray[np.float32]:
    """Return an image of noise and a constant one, all-zero after a mean of 0.5: [2, C, H, W]."""
    noise = np.random.default_rng(0).random((1, *shape), dtype=np.float32)
    return np.concatenate([noise, np.full((1, *shape), 0.5, dtype=np.float32)])
