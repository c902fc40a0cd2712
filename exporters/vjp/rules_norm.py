"""Rules of normalisations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ccn_deploy.exporters.vjp.rules_elementwise import Owed
from ccn_deploy.exporters.vjp.table import rule
from ccn_deploy.exporters.vjp.tape import Gradient, Site

SCALE = "scale and shift not dependent on the images"


@rule("BatchNormalization", limits="with constant statistics, as in deployment")
def _batch_norm(at: Site, g: Gradient) -> Owed:
    if at.attribute("training_mode", 0):
        at.refuse("takes its statistics from the batch")
    gamma = at.constant(1, "a scale").astype(np.float64)
    variance = at.constant(4, "a variance").astype(np.float64)
    factor = gamma / np.sqrt(variance + at.attribute("epsilon", 1e-5))
    return [at.scaled(g, at.array(per_channel(at, factor), "factor"))]


def per_channel(at: Site, value: np.ndarray) -> np.ndarray:
    """Give a vector of channels the axes that broadcast to x."""
    return value.reshape(-1, *[1] * (at.rank(at.x) - 2))


def _only_scale(at: Site) -> None:
    if at.needed(1) or at.needed(2):
        at.refuse("has a scale or a shift that depends on the images")


def _mean(at: Site, tensor: str, axes: Sequence[int]) -> str:
    return at.add("ReduceMean", tensor, at.ints(*axes), keepdims=1)


@dataclass(frozen=True)
class Normal:
    """A forward tensor, normalised once more, as the forward pass did.

    Attributes:
        tensor: Name of the normalised tensor.
        inverse: Name of one over the deviation, whose axes are kept as 1.
        axes: What was normalised over, from -1 down: the same with candidates in front.
        centred: Whether the mean was taken off.
    """

    tensor: str
    inverse: str
    axes: Sequence[int]
    centred: bool


def normalised(
    at: Site, x: str, axes: Sequence[int], epsilon: float, *, centred: bool = True
) -> Normal:
    """Normalise a forward tensor; epsilon is added to its variance."""
    apart = at.add("Sub", x, _mean(at, x, axes), part="apart") if centred else x
    variance = _mean(at, at.add("Mul", apart, apart), axes)
    deviation = at.add("Sqrt", at.add("Add", variance, at.number(epsilon)), part="deviation")
    inverse = at.add("Reciprocal", deviation, part="inverse")
    return Normal(at.add("Mul", apart, inverse, part="normal"), inverse, axes, centred)


def through(at: Site, tensor: str, n: Normal) -> Gradient:
    """Go back through a normalisation: ``(g - mean(g) - n * mean(g * n)) / deviation``."""
    pull = _mean(at, at.add("Mul", tensor, n.tensor), n.axes)
    rest = at.add("Sub", tensor, _mean(at, tensor, n.axes)) if n.centred else tensor
    return Gradient(at.add("Sub", rest, at.add("Mul", n.tensor, pull)), n.inverse)


@rule("LayerNormalization", "RMSNormalization", limits=SCALE)
def _layer_norm(at: Site, g: Gradient) -> Owed:
    _only_scale(at)
    rank = at.rank(at.x)
    axes = list(range(at.attribute("axis", -1) % rank - rank, 0))
    centred = at.node.op == "LayerNormalization"
    n = normalised(at, at.x, axes, at.attribute("epsilon", 1e-5), centred=centred)
    return [through(at, at.whole(at.scaled(g, at.node.inputs[1])), n)]


@rule("InstanceNormalization", limits=SCALE)
def _instance_norm(at: Site, g: Gradient) -> Owed:
    _only_scale(at)
    axes = list(range(2 - at.rank(at.x), 0))
    n = normalised(at, at.x, axes, at.attribute("epsilon", 1e-5))
    gamma = at.array(per_channel(at, at.constant(1, "a scale")), "gamma")
    return [through(at, at.whole(at.scaled(g, gamma)), n)]


@rule("GroupNormalization", limits=SCALE)
def _group_norm(at: Site, g: Gradient) -> Owed:
    _only_scale(at)
    gamma, groups = at.constant(1, "a scale"), at.attribute("num_groups")
    channels, *sizes = at.sizes(at.x)
    inner = channels // groups * int(np.prod(sizes))
    grouped = at.add("Reshape", at.x, at.ints(-1, groups, inner), part="grouped")
    n = normalised(at, grouped, [-1], at.attribute("epsilon", 1e-5))
    scaled = at.whole(at.scaled(g, at.array(per_channel(at, gamma), "gamma")))
    tensor = at.shaped(scaled, (at.shape(at.x)[0], groups, inner))
    back = at.whole(through(at, tensor, n))
    return [Gradient(at.shaped(back, at.shape(at.x)))]


@rule("MeanVarianceNormalization", limits="axes that do not depend on the batch")
def _mean_variance_norm(at: Site, g: Gradient) -> Owed:
    rank = at.rank(at.x)
    axes = [axis % rank - rank for axis in at.attribute("axes", [0, 2, 3])]
    at.sizes(at.x, [axis + rank for axis in axes])
    return [through(at, at.whole(g), normalised(at, at.x, axes, 1e-9))]


@rule("LpNormalization")
def _lp_norm(at: Site, g: Gradient) -> Owed:
    """``(g - d * sum(g * y)) / norm``, where d is y for p = 2 and sign(x) for p = 1."""
    order = at.attribute("p", 2)
    axis = at.attribute("axis", -1) % at.rank(at.x)
    at.sizes(at.x, [axis])
    norm = at.add("ReduceL2" if order == 2 else "ReduceL1", at.x, at.ints(axis), keepdims=1)
    # Where all is zero, so is what comes out and what goes back.
    some = at.add("Greater", norm, at.number(0))
    inverse = at.add("Where", some, at.add("Reciprocal", norm), at.number(0))
    outward = at.y if order == 2 else at.add("Sign", at.x)
    tensor = at.whole(g)
    pull = at.summed(at.add("Mul", tensor, at.y), [axis])
    return [Gradient(at.add("Sub", tensor, at.add("Mul", outward, pull)), inverse)]


@rule("LRN")
def _local_response_norm(at: Site, g: Gradient) -> Owed:
    """Go back through ``y = x * s**-beta``, where s adds up the squares of near channels.

    ``s = bias + alpha / size * (sum of x**2 over neighbours)``. That is
    ``g * s**-beta - 2 alpha beta / size * x * (sum of g * y / s over neighbours, reversed)``;
    the sum over neighbouring channels is a product with a banded matrix.
    """
    channels, *sizes = at.sizes(at.x)
    size, beta = at.attribute("size"), at.attribute("beta", 0.75)
    share = at.attribute("alpha", 1e-4) / size
    offset = np.arange(channels)[None, :] - np.arange(channels)[:, None]
    before, behind = (size - 1) // 2, size - 1 - (size - 1) // 2
    band = ((offset >= -before) & (offset <= behind)).astype(np.float32)
    flat = int(np.prod(sizes))

    squares = at.add("Mul", at.x, at.x, part="squares")
    columns = at.add("Reshape", squares, at.ints(-1, channels, flat))
    near = at.add("MatMul", at.array(band * share, "band"), columns)
    back = at.add("Reshape", near, at.ints(-1, channels, *sizes))
    s = at.add("Add", back, at.number(at.attribute("bias", 1.0)), part="s")
    power = at.add("Pow", s, at.number(-beta), part="power")
    tensor = at.whole(g)
    pull = at.add("Mul", tensor, at.add("Div", at.y, s))
    turned = at.array(band.T * (2 * share * beta), "turned")
    total = at.add("MatMul", turned, at.fold(pull, [channels, flat]))
    inward = at.add("Mul", at.unfold(total, [channels, *sizes]), at.x)
    return [Gradient(at.add("Sub", at.add("Mul", tensor, power), inward))]
