"""From a network to the ONNX graph of its input gradients: the backward pass, written by hand.

The graph maps images [batch, C, H, W] and cotangents [batch, candidates, classes] to the logits
and to gradients [batch, candidates, C, H, W]: row k is the gradient of
``sum_j cotangents[n, k, j] * logits[n, j]`` with respect to image n. It begins with the nodes of
the forward graph, which run once for all candidates, and goes back through the layers with one
short function for each kind. Standard ops only; both leading dimensions are symbolic.

Node ``<layer>.grad`` gives the gradient at the input of a layer and ``<layer>.grad.<part>`` the
steps before it; a layer whose backward is a factor (activations, max-pool) has steps only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper
from torch import nn

from ccn_deploy.errors import LoweringError
from ccn_deploy.exporters.lowering import add_layer, deployed_layers
from ccn_deploy.graph.builder import GraphBuilder
from ccn_deploy.graph.signature import BATCH, CANDIDATES, COTANGENTS, GRADIENTS, INPUT, OUTPUT
from ccn_deploy.layers import (
    SQUARE_FLOOR,
    BoundedReLU,
    CompactConv2d,
    CompactLinear,
    SubtractMean,
)
from ccn_deploy.models import Classifier

WIDE = 8
"""Channels from which on a transposed convolution is written as a plain one.

ONNX Runtime's CPU kernels compute at least a block of channels: 32 -> 1 as a Conv took nine times
as long as the ConvTranspose, 64 -> 64 was a tenth faster."""

LEAD = f"{COTANGENTS}.lead"
"""The tensor [batch, candidates] of the two leading sizes."""

LIFTED = f"{COTANGENTS}.axis"
"""The constant [1]: where tensors that belong to an image get an axis for its candidates."""


@dataclass(frozen=True)
class Gradient:
    """A gradient on its way back: ``tensor * factor``.

    What is the same for all candidates of an image is gathered in the factor, and multiplied into
    the many candidates once.

    Attributes:
        tensor: Name of a tensor [batch, candidates, ...].
        factor: Name of a tensor [batch, ...], or None for 1.
    """

    tensor: str
    factor: str | None = None


@dataclass(frozen=True)
class Placed:
    """A layer in the graph.

    Attributes:
        name: The layer's, as in the weights file.
        layer: The layer.
        x: Name of the tensor it reads.
        y: Name of the tensor it returns.
    """

    name: str
    layer: nn.Module
    x: str
    y: str


@dataclass(frozen=True)
class Site:
    """One layer on the way back: the graph so far, and what the forward pass left there.

    Attributes:
        builder: Takes the nodes.
        placed: The layer, and the tensors it reads and returns.
        x_shape: Of one image's x, such as (C, H, W).
        y_shape: Of one image's y.
    """

    builder: GraphBuilder
    placed: Placed
    x_shape: tuple[int, ...]
    y_shape: tuple[int, ...]

    def name(self, part: str = "") -> str:
        """Return the name of a step back, or of the gradient at the layer's input."""
        return f"{self.placed.name}.grad" + (f".{part}" if part else "")

    def forward(self, part: str) -> str:
        """Return the name of a tensor that the layer's forward pass made or was given."""
        return f"{self.placed.name}.{part}"

    def node(self, op: str, inputs: Sequence[str], part: str = "", **attributes: Any) -> str:
        """Add a step."""
        return self.builder.node(op, inputs, self.name(part), **attributes)

    def constant(self, part: str, value: NDArray[Any] | np.generic) -> str:
        """Add a constant."""
        return self.builder.constant(self.name(part), value)

    def sizes(self, part: str, *sizes: int) -> str:
        """Add a constant of int64 sizes or axes."""
        return self.constant(part, np.array(sizes, dtype=np.int64))

    def floats(self, truth: str, part: str) -> str:
        """Return a tensor of bool as 0.0 and 1.0."""
        return self.node("Cast", [truth], part, to=TensorProto.FLOAT)

    def times(self, tensor: str, own: str, part: str) -> str:
        """Multiply [batch, candidates, ...] by the image's own [batch, ...]."""
        lifted = self.node("Unsqueeze", [own, LIFTED], f"{part}.lifted")
        return self.node("Mul", [tensor, lifted], part)

    def scaled(self, gradient: Gradient, own: str, part: str) -> Gradient:
        """Multiply a gradient by the image's own [batch, ...], later."""
        if gradient.factor is not None:
            own = self.node("Mul", [gradient.factor, own], f"{part}.factor")
        return replace(gradient, factor=own)

    def whole(self, gradient: Gradient, part: str = "whole") -> str:
        """Return the tensor of a gradient with its factor multiplied in."""
        if gradient.factor is None:
            return gradient.tensor
        return self.times(gradient.tensor, gradient.factor, part)

    def fold(self, tensor: str, shape: Sequence[int], part: str) -> str:
        """Make [batch, candidates, *shape] a batch [batch * candidates, *shape], in place."""
        return self.node("Reshape", [tensor, self.sizes(f"{part}.shape", -1, *shape)], part)

    def unfold(self, tensor: str, shape: Sequence[int], part: str = "") -> str:
        """Undo :meth:`fold`."""
        inner = self.sizes(f"{part}.inner" if part else "inner", *shape)
        outer = self.node("Concat", [LEAD, inner], f"{part}.outer" if part else "outer", axis=0)
        return self.node("Reshape", [tensor, outer], part)


Backward = Callable[[Site, Any, Gradient], Gradient]
"""Adds a layer's steps back: from the gradient at its output to the one at its input."""


def lower_gradient(model: Classifier) -> onnx.ModelProto:
    """Return the graph of a network's logits and input gradients in float32.

    Raises:
        LoweringError: A kind of layer, or an option of one, that has no lowering.
    """
    builder = GraphBuilder()
    placed = place_layers(builder, model)
    shapes = tensor_shapes(model, placed)
    builder.node("Shape", [COTANGENTS], LEAD, start=0, end=2)
    builder.constant(LIFTED, np.array([1], dtype=np.int64))
    gradient = Gradient(COTANGENTS)
    for place in reversed(placed):
        site = Site(builder, place, shapes[place.x], shapes[place.y])
        gradient = BACKWARDS[type(place.layer)](site, place.layer, gradient)
    builder.node("Identity", [site.whole(gradient)], GRADIENTS)
    return builder.model(
        model.architecture.name,
        {
            INPUT: [BATCH, *model.architecture.input_shape],
            COTANGENTS: [BATCH, CANDIDATES, model.classes],
        },
        {
            OUTPUT: [BATCH, model.classes],
            GRADIENTS: [BATCH, CANDIDATES, *model.architecture.input_shape],
        },
    )


def place_layers(builder: GraphBuilder, model: Classifier) -> list[Placed]:
    """Add the nodes of every layer and return the layers in order of execution."""
    placed: list[Placed] = []
    layers, x = deployed_layers(model), INPUT
    for name, layer in layers:
        y = OUTPUT if name == layers[-1][0] else name
        add_layer(builder, layer, name, x, y)
        placed.append(Placed(name, layer, x, y))
        x = y
    return placed


def tensor_shapes(model: Classifier, placed: Sequence[Placed]) -> dict[str, tuple[int, ...]]:
    """Return the shape of one image's share of every tensor between layers, by its name."""
    shapes: dict[str, tuple[int, ...]] = {INPUT: model.architecture.input_shape}
    with torch.inference_mode():
        value = torch.zeros(1, *shapes[INPUT])
        for place in placed:
            value = place.layer(value)
            shapes[place.y] = tuple(value.shape[1:])
    return shapes


def _mean(at: Site, layer: SubtractMean, g: Gradient) -> Gradient:
    return g


def _relu(at: Site, layer: nn.ReLU, g: Gradient) -> Gradient:
    """Pass where the output is positive; at 0 nothing passes, as in PyTorch."""
    zero = at.constant("zero", np.float32(0))
    return at.scaled(g, at.floats(at.node("Greater", [at.placed.y, zero], "on"), "mask"), "mask")


def _bounded_relu(at: Site, layer: BoundedReLU, g: Gradient) -> Gradient:
    """Pass where nothing is clipped, 0 and 1 themselves included, as in PyTorch.

    Not where input and output are equal: a runtime may round the one and not the other.
    """
    above = at.node("GreaterOrEqual", [at.placed.x, at.forward("low")], "above")
    below = at.node("LessOrEqual", [at.placed.x, at.forward("high")], "below")
    passing = at.node("And", [above, below], "on")
    return at.scaled(g, at.floats(passing, "mask"), "mask")


def _flatten(at: Site, layer: nn.Flatten, g: Gradient) -> Gradient:
    return Gradient(at.unfold(at.whole(g), at.x_shape))


def _max_pool(at: Site, layer: nn.MaxPool2d, g: Gradient) -> Gradient:
    """Give each window's gradient to its maximum; of equal ones to the first, as PyTorch does.

    Ties are everywhere: a constant background makes whole windows equal. MaxPool could return
    where its maxima are, but TensorRT takes no such graph. So a second max-pool picks, among the
    positions that hold the maximum, the one of the highest rank.
    """
    kernel = _pair(layer.kernel_size)
    _, height, width = at.x_shape
    tiled = kernel == _pair(layer.stride) and _pair(layer.padding) == (0, 0)
    _require(tiled, at, "a max-pool of windows that overlap or are padded")
    tiled = height % kernel[0] == 0 and width % kernel[1] == 0
    _require(tiled, at, f"a max-pool of {height}x{width} that leaves a border out")

    ranks = np.arange(kernel[0] * kernel[1], 0, -1, dtype=np.float32).reshape(kernel)
    rank = at.constant("rank", np.tile(ranks, (height // kernel[0], width // kernel[1])))
    scales = at.constant("scales", np.array([1, 1, *kernel], dtype=np.float32))

    def enlarged(tensor: str, part: str) -> str:
        """Repeat every value over its window."""
        return at.node(
            "Resize", [tensor, "", scales], part,
            mode="nearest", coordinate_transformation_mode="asymmetric", nearest_mode="floor",
        )  # fmt: skip

    maximal = at.node("Equal", [at.placed.x, enlarged(at.placed.y, "maximum")], "maximal")
    ranked = at.node("Mul", [at.floats(maximal, "held"), rank], "ranked")
    highest = at.node("MaxPool", [ranked], "highest", kernel_shape=kernel, strides=kernel)
    first = at.node("Equal", [ranked, enlarged(highest, "winner")], "first")
    folded = at.fold(at.whole(g), at.y_shape, "folded")
    spread = at.unfold(enlarged(folded, "enlarged"), at.x_shape, "spread")
    return Gradient(spread, at.floats(first, "mask"))


def _linear(at: Site, layer: nn.Linear, g: Gradient) -> Gradient:
    return Gradient(at.node("MatMul", [at.whole(g), at.forward("weight")]))


def _conv(at: Site, layer: nn.Conv2d, g: Gradient) -> Gradient:
    folded = at.fold(at.whole(g), at.y_shape, "folded")
    back = _transposed_conv(at, layer, folded, "weight", "conv")
    return Gradient(at.unfold(back, at.x_shape))


def _compact_linear(at: Site, layer: CompactLinear, g: Gradient) -> Gradient:
    def back(tensor: str) -> str:
        return at.node("MatMul", [tensor, at.forward("weight")], "product")

    return _compact(at, g, at.forward("squares"), back, lambda tensor: tensor)


def _compact_conv(at: Site, layer: CompactConv2d, g: Gradient) -> Gradient:
    def back(tensor: str) -> str:
        folded = at.fold(tensor, at.y_shape, "folded")
        conv = _transposed_conv(at, layer, folded, "weight", "conv")
        return at.unfold(conv, at.x_shape, "product")

    def spread(tensor: str) -> str:
        folded = at.fold(tensor, (1, *at.y_shape[1:]), "pull.folded")
        conv = _transposed_conv(at, layer, folded, "ones", "pull.conv")
        return at.unfold(conv, (1, *at.x_shape[1:]), "patches")

    return _compact(at, g, at.forward("patches"), back, spread)


def _compact(
    at: Site,
    g: Gradient,
    squares: str,
    back: Callable[[str], str],
    spread: Callable[[str], str],
) -> Gradient:
    """Go back through ``y = q + b`` with ``q = (alpha W) x * r`` and ``r = 1 / (norm + delta)``.

    ``g_x = (alpha W)^T (g r) - x * ones^T (sum_out(g r q) / norm)``: the first term holds the norm
    fixed, the second holds the product fixed. Where the sum of squares is below the floor of
    :func:`ccn_deploy.layers.guarded_sqrt` the norm counts as constant and the second term is 0.

    Args:
        at: The layer.
        g: Gradient at y.
        squares: Name of the sums of squares under the root.
        back: Adds the transposed product with alpha W.
        spread: Adds the sum over all patches that an input position belongs to.
    """
    r = at.node("Reciprocal", [at.forward("divisor")], "r")
    flow = at.whole(at.scaled(g, r, "flow"), "flow")
    shares = at.times(flow, at.forward("quotient"), "shares")
    total = at.node("ReduceSum", [shares, at.sizes("outputs", 2)], "total", keepdims=1)
    floor = at.constant("floor", np.float32(SQUARE_FLOOR))
    steep = at.node("GreaterOrEqual", [squares, floor], "steep")
    inverse = at.node("Reciprocal", [at.forward("norm")], "inverse")
    slope = at.node("Where", [steep, inverse, at.constant("zero", np.float32(0))], "slope")
    pull = at.times(total, slope, "pull")
    inward = at.times(spread(pull), at.placed.x, "inward")
    return Gradient(at.node("Sub", [back(flow), inward]))


def _transposed_conv(at: Site, layer: nn.Conv2d, tensor: str, kernel: str, part: str) -> str:
    """Add the transpose of a layer's convolution with one of its constants.

    With stride 1 it is a convolution too, with the kernel transposed, turned by half a circle
    and fully padded, and faster as such unless it is narrow; see :data:`WIDE`.
    """
    weight = numpy_helper.to_array(at.builder.constants[at.forward(kernel)])
    size, stride, padding = weight.shape[2:], _pair(layer.stride), _pair(layer.padding)
    full = tuple(k - 1 - p for k, p in zip(size, padding, strict=True))
    if weight.shape[1] >= WIDE and stride == (1, 1) and min(full) >= 0:
        turned = at.constant(kernel, weight.swapaxes(0, 1)[:, :, ::-1, ::-1])
        return at.node("Conv", [tensor, turned], part, kernel_shape=size, pads=full * 2)
    missed = [
        (x + 2 * p - k) % s
        for x, k, s, p in zip(at.x_shape[1:], size, stride, padding, strict=True)
    ]
    return at.node(
        "ConvTranspose", [tensor, at.forward(kernel)], part,
        kernel_shape=size, strides=stride, pads=padding * 2, output_padding=missed,
    )  # fmt: skip


BACKWARDS: dict[type[nn.Module], Backward] = {
    SubtractMean: _mean,
    nn.Conv2d: _conv,
    CompactConv2d: _compact_conv,
    nn.Linear: _linear,
    CompactLinear: _compact_linear,
    nn.ReLU: _relu,
    BoundedReLU: _bounded_relu,
    nn.MaxPool2d: _max_pool,
    nn.Flatten: _flatten,
}
"""By exact type, as :data:`ccn_deploy.exporters.lowering.LOWERINGS`."""


def _pair(value: Any) -> tuple[int, int]:
    return (value, value) if isinstance(value, int) else (value[0], value[1])


def _require(holds: bool, at: Site, what: str) -> None:
    if not holds:
        raise LoweringError(
            f"Layer {at.placed.name!r} is {what}, whose gradient has no lowering to ONNX.",
            "Use the layers that the architectures of this package use, or export without the "
            "gradient graph.",
        )
