"""One evaluation of every exported graph by ONNX's own definition of its ops.

A probe, not a proof: it keeps a graph that computes something else from ever being written.
`verify-parity` measures the real error.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from onnx.reference.op_run import OpRun

from ccn_deploy.errors import LoweringError
from ccn_deploy.graph.signature import COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.layers import CompactConv2d, CompactLinear
from ccn_deploy.models import Classifier

PROBE_TOLERANCE = 1e-3
"""Allowed error of a probe, relative to the largest logit or slope. A slip in the lowering is
orders of magnitude larger; rounding, and the floor under the norm of empty patches, are smaller."""

CANDIDATES_PROBED = 2

HINT = "Nothing was written; this is a bug in the exporter, please report it."


def check_probe(graph: onnx.ModelProto, model: Classifier) -> None:
    """Evaluate a forward graph once beside the network: an image of noise and a constant one.

    Raises:
        LoweringError: Logits that are not finite or not the network's.
    """
    images = _images(model, noisy=1)
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
            HINT,
        )


def check_gradient_probe(graph: onnx.ModelProto, model: Classifier) -> None:
    """Evaluate a gradient graph once, in float64, beside float64 autograd.

    In float32, rounding turns activations on or off and chooses other maxima, which moves the
    gradient of some networks by a tenth; in float64 it does not, so that what differs is wrong.
    On a constant image, where windows tie and the first layer's patches are zero, the gradients
    must be finite.

    Raises:
        LoweringError: Gradients that are not finite or not the network's.
    """
    images = _images(model, noisy=1).astype(np.float64)
    shape = (len(images), CANDIDATES_PROBED, model.classes)
    cotangents = np.random.default_rng(1).standard_normal(shape)
    wanted = _autograd(model, images, cotangents)[0]
    evaluator = ReferenceEvaluator(_in_double(graph), new_ops=[Resize])
    with np.errstate(all="ignore"):  # 1 / 0 for an empty patch, which a Where drops
        (found,) = evaluator.run([GRADIENTS], {INPUT: images, COTANGENTS: cotangents})
    got = np.asarray(found)
    if not np.isfinite(got).all():
        raise LoweringError("The gradient graph gives gradients that are not finite.", HINT)
    error = np.abs(got[0] - wanted).max() / np.abs(wanted).max()
    if not error < PROBE_TOLERANCE:
        raise LoweringError(
            f"The gradient graph is off by {error:.1e} of the largest slope from the network it "
            "was made from.",
            HINT,
        )


class Resize(OpRun):
    """Nearest-neighbour enlargement by whole factors, the one form that gradient graphs have.

    ONNX's own evaluator goes pixel by pixel through all forms of this op: a minute for an image of
    ImageNet's size, where this takes milliseconds.
    """

    def _run(self, x: NDArray[Any], roi: Any, scales: NDArray[Any], **form: Any) -> Any:
        assert form["mode"] == "nearest" and form["nearest_mode"] == "floor"
        assert form["coordinate_transformation_mode"] == "asymmetric"
        for axis, scale in enumerate(scales):
            x = x.repeat(int(scale), axis)
        return (x,)


def _images(model: Classifier, *, noisy: int) -> NDArray[np.float32]:
    """Return images of noise and, last, a constant one: all-zero patches after the mean."""
    shape = model.architecture.input_shape
    noise = np.random.default_rng(0).random((noisy, *shape), dtype=np.float32)
    return np.concatenate([noise, np.full((1, *shape), 0.5, dtype=np.float32)])


def _in_double(graph: onnx.ModelProto) -> onnx.ModelProto:
    """Return a copy of a graph that computes in float64 with the same constants."""
    constants = [
        numpy_helper.from_array(numpy_helper.to_array(c).astype(np.float64), c.name)
        if c.data_type == TensorProto.FLOAT
        else c
        for c in graph.graph.initializer
    ]
    body = graph.graph
    copy = helper.make_graph(body.node, body.name, body.input, body.output, constants)
    for node in copy.node:
        if node.op_type == "Cast":
            node.attribute[0].i = TensorProto.DOUBLE
    return helper.make_model(copy, opset_imports=graph.opset_import, ir_version=graph.ir_version)


def _autograd(
    model: Classifier, images: NDArray[np.float64], cotangents: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return input gradients [N, K, C, H, W] in float64 of the network as it is deployed."""
    state = {key: value.double() for key, value in model.state_dict().items()}
    for name, layer in model.named_layers():
        if isinstance(layer, CompactConv2d | CompactLinear):
            # Alpha goes into the weights in float32; rounding it elsewhere is another network.
            state[f"{name}.weight"] = (layer.weight * layer.alpha).double()
            state[f"{name}.alpha"] = torch.ones((), dtype=torch.float64)
    buffers = {key: value.double() for key, value in model.named_buffers()}
    leaf = torch.from_numpy(images).requires_grad_(True)
    logits = torch.func.functional_call(model, {**buffers, **state}, (leaf,))
    rows = torch.from_numpy(cotangents).unbind(1)
    gradients = [torch.autograd.grad(logits, leaf, row, retain_graph=True)[0] for row in rows]
    found: NDArray[np.float64] = torch.stack(gradients, 1).numpy()
    return found
