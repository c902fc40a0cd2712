"""Bundles that lie: healthy ones with one planted fault, and digests that match it.

What an attacker or a bug could ship: the manifest vouches for the bytes, the bytes compute
something else. Every check of function must catch each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
from onnx import helper, numpy_helper

from ccn_deploy.bundle import Bundle, NewFile, write_bundle
from ccn_deploy.targets import Role

Fault = Callable[[Bundle, Path], Bundle]

LOGITS = "logits"
GRADIENTS = "gradients"


def swap_rows(bundle: Bundle, output: Path) -> Bundle:
    """Return the rows of every batch in reverse: right for one image, wrong for several."""

    return edited(bundle, output, lambda graph: _reverse(graph, LOGITS, 0))


def drop_delta(bundle: Bundle, output: Path) -> Bundle:
    """Set every delta of a compact network to zero: an all-zero patch becomes 0 / 0."""

    def edit(graph: onnx.GraphProto) -> None:
        deltas = [c for c in graph.initializer if c.name.endswith(".delta")]
        assert deltas, "this network has no compact layer"
        for constant in deltas:
            _set(constant, np.zeros_like(numpy_helper.to_array(constant)))

    return edited(bundle, output, edit)


def reorder_classes(bundle: Bundle, output: Path) -> Bundle:
    """Exchange the first two classes."""

    def edit(graph: onnx.GraphProto) -> None:
        for what in ("weight", "bias"):
            constant = _constant(graph, f"{_last(graph).name}.{what}")
            value = numpy_helper.to_array(constant).copy()
            value[[0, 1]] = value[[1, 0]]
            _set(constant, value)

    return edited(bundle, output, edit)


def perturb_layer(
    bundle: Bundle, output: Path, layer: str = "conv2", amount: float = 1e-3
) -> Bundle:
    """Change each weight of a layer by a random part of itself, about ``amount``."""

    def edit(graph: onnx.GraphProto) -> None:
        constant = _constant(graph, f"{layer}.weight")
        value = numpy_helper.to_array(constant)
        noise = np.random.default_rng(0).standard_normal(value.shape)
        _set(constant, (value * (1 + amount * noise)).astype(value.dtype))

    return edited(bundle, output, edit)


def lose_alpha(bundle: Bundle, output: Path, layer: str = "conv3") -> Bundle:
    """Leave out the scale of one compact layer, which the exporter folds into its weights."""
    import safetensors.numpy

    weights = safetensors.numpy.load(bundle.read(bundle.file(Role.WEIGHTS)))

    def edit(graph: onnx.GraphProto) -> None:
        _set(_constant(graph, f"{layer}.weight"), weights[f"{layer}.weight"])

    return edited(bundle, output, edit)


def turn_kernel_back(bundle: Bundle, output: Path, layer: str = "conv2") -> Bundle:
    """Go back through a convolution with its kernel transposed and not turned."""

    def edit(graph: onnx.GraphProto) -> None:
        (constant,) = (
            c
            for c in graph.initializer
            if c.name in (f"{layer}.grad.turned", f"{layer}.product.grad.turned")
        )
        _set(constant, np.ascontiguousarray(numpy_helper.to_array(constant)[:, :, ::-1, ::-1]))

    return edited(bundle, output, edit, role=Role.GRADIENT)


def hold_norm_fixed(bundle: Bundle, output: Path) -> Bundle:
    """Leave out the second term of a compact layer's gradient, the slope of its norm."""

    def edit(graph: onnx.GraphProto) -> None:
        node = _node(graph, "act1.grad")  # adds up the gradients by conv2's product and its norm
        assert node.input[0] == "conv2.product.grad.unfolded"
        node.op_type = "Identity"
        del node.input[1]

    return edited(bundle, output, edit, role=Role.GRADIENT)


def pass_to_every_maximum(bundle: Bundle, output: Path) -> Bundle:
    """Give the gradient of a window to all of its maxima instead of the first."""

    def edit(graph: onnx.GraphProto) -> None:
        for pool in ("pool1", "pool2"):
            mask = _node(graph, f"{pool}.grad.mask")
            mask.input[0] = f"{pool}.grad.maximal"

    return edited(bundle, output, edit, role=Role.GRADIENT)


def swap_candidates(bundle: Bundle, output: Path) -> Bundle:
    """Return the candidates of every image in reverse: right for one, wrong for several."""
    return edited(bundle, output, lambda graph: _reverse(graph, GRADIENTS, 1), role=Role.GRADIENT)


def swap_gradients(bundle: Bundle, output: Path) -> Bundle:
    """Return the gradients of a batch in reverse: right for one image, wrong for several."""
    return edited(bundle, output, lambda graph: _reverse(graph, GRADIENTS, 0), role=Role.GRADIENT)


def another_forward(bundle: Bundle, output: Path) -> Bundle:
    """Take the gradients of a network whose weights are a little different."""

    def edit(graph: onnx.GraphProto) -> None:
        constant = _constant(graph, "conv3.weight")
        value = numpy_helper.to_array(constant)
        _set(constant, value * np.float32(1.001))

    return edited(bundle, output, edit, role=Role.GRADIENT)


def edited(
    bundle: Bundle,
    output: Path,
    edit: Callable[[onnx.GraphProto], None],
    *,
    role: Role = Role.FORWARD,
) -> Bundle:
    """Write a copy of a bundle with the graphs of a role edited, and a manifest that agrees.

    The float32 forward graph is the network itself and stays: ONNX Runtime on the CPU gets one of
    its own, edited.
    """
    files = []
    for record in bundle.manifest.files:
        file = NewFile.copy(bundle, record)
        if record.role == role:
            model = onnx.load_model_from_string(file.data)
            edit(model.graph)
            onnx.checker.check_model(model, full_check=True)
            data = model.SerializeToString(deterministic=True)
            if (record.role, record.precision, record.runtime) == (Role.FORWARD, "fp32", ""):
                files.append(file)
                path = f"{record.path.removesuffix('.onnx')}-edited.onnx"
                file = replace(file, path=path, runtime="onnxruntime-cpu")
            file = replace(file, data=data)
        files.append(file)
    return write_bundle(output, card=bundle.card, files=files)


def _reverse(graph: onnx.GraphProto, output: str, axis: int) -> None:
    """Put an output of the graph in reverse order along an axis."""
    (last,) = (node for node in graph.node if output in node.output)
    layer, straight = last.name, f"{output}.straight"
    last.name, last.output[0] = f"{layer}.straight", straight
    constants = {"starts": [-1], "ends": [np.iinfo(np.int64).min], "axes": [axis], "steps": [-1]}
    for name, value in constants.items():
        graph.initializer.append(
            numpy_helper.from_array(np.array(value, np.int64), f"{layer}.reverse.{name}")
        )
    inputs = [straight, *(f"{layer}.reverse.{name}" for name in constants)]
    graph.node.append(helper.make_node("Slice", inputs, [output], name=layer))


def _last(graph: onnx.GraphProto) -> onnx.NodeProto:
    (node,) = (node for node in graph.node if LOGITS in node.output)
    return node


def _node(graph: onnx.GraphProto, name: str) -> onnx.NodeProto:
    (node,) = (node for node in graph.node if node.name == name)
    return node


def _constant(graph: onnx.GraphProto, name: str) -> onnx.TensorProto:
    (constant,) = (constant for constant in graph.initializer if constant.name == name)
    return constant


def _set(constant: onnx.TensorProto, value: np.ndarray) -> None:
    constant.CopyFrom(numpy_helper.from_array(np.asarray(value), constant.name))
