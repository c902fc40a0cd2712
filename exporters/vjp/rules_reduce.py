"""Rules of reductions, and of functions along an axis."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from ccn_deploy.exporters.vjp.rules_elementwise import Owed
from ccn_deploy.exporters.vjp.table import rule
from ccn_deploy.exporters.vjp.tape import Gradient, Site
from ccn_deploy.layers import SQUARE_FLOOR

NO_BATCH = "axes that do not depend on the batch"


def spread(at: Site, tensor: str, axes: Sequence[int], number: float) -> Gradient:
    """Multiply a gradient whose axes are kept as 1 by a number, for all of x along them.

    The factor brings the missing sizes, so nothing is written out before it must be.
    """
    sizes = at.sizes(at.x, axes)
    shape = [1] * at.rank(at.x)
    for axis, size in zip(axes, sizes, strict=True):
        shape[axis] = size
    return Gradient(tensor, at.array(np.full(shape, float(number)), "spread"))


def evenly(at: Site, tensor: str, y: str, axes: Sequence[int]) -> Gradient:
    """Share a gradient whose axes are kept as 1 among all of x that equal y, as torch.amax does."""
    hits = at.floats(at.add("Equal", at.x, y))
    count = at.add("ReduceSum", hits, at.ints(*axes), keepdims=1, part="count")
    return Gradient(tensor, at.add("Div", hits, count, part="share"))


def reduced_axes(at: Site) -> list[int]:
    """Return the axes of a reduction, from 0 on."""
    rank = at.rank(at.x)
    axes = at.integers(1, "axes") if at.given(1) else list(at.attribute("axes") or [])
    if not axes and not at.attribute("noop_with_empty_axes", 0):
        axes = list(range(rank))
    axes = sorted(axis % rank for axis in axes)
    at.sizes(at.x, axes)
    return axes


def kept(at: Site, name: str, axes: Sequence[int], ahead: int = 0) -> str:
    """Return a tensor of the output's shape with the reduced axes kept as 1.

    Args:
        at: The reduction.
        name: Name of the tensor.
        axes: Reduced axes of x.
        ahead: How many axes come before those of the output: 1 for a gradient.
    """
    if at.attribute("keepdims", 1) or not axes:
        return name
    return at.add("Unsqueeze", name, at.ints(*[axis + ahead for axis in axes]))


@rule("ReduceSum", limits=NO_BATCH)
def _sum(at: Site, g: Gradient) -> Owed:
    axes = reduced_axes(at)
    return [spread(at, kept(at, at.whole(g), axes, 1), axes, 1)]


@rule("ReduceMean", limits=NO_BATCH)
def _mean(at: Site, g: Gradient) -> Owed:
    axes = reduced_axes(at)
    number = 1 / math.prod(at.sizes(at.x, axes))
    return [spread(at, kept(at, at.whole(g), axes, 1), axes, number)]


def _scaled_up(at: Site, g: Gradient, axes: Sequence[int], own: str) -> Owed:
    return [Gradient(kept(at, at.whole(g), axes, 1), own)]


@rule("ReduceSumSquare", limits=NO_BATCH)
def _sum_square(at: Site, g: Gradient) -> Owed:
    axes = reduced_axes(at)
    # Twice on the small side: the sum has fewer numbers than x.
    doubled = at.add("Mul", kept(at, at.whole(g), axes, 1), at.number(2), part="doubled")
    return [Gradient(doubled, at.x)]


@rule("ReduceL1", limits=NO_BATCH)
def _l1(at: Site, g: Gradient) -> Owed:
    return _scaled_up(at, g, reduced_axes(at), at.add("Sign", at.x))


@rule("ReduceL2", limits=NO_BATCH)
def _l2(at: Site, g: Gradient) -> Owed:
    """``x / y``, and 0 where the sum of squares is below the floor, as for Sqrt."""
    axes = reduced_axes(at)
    norm = kept(at, at.y, axes)
    steep = at.add("GreaterOrEqual", norm, at.number(math.sqrt(SQUARE_FLOOR)))
    inverse = at.add("Where", steep, at.add("Reciprocal", norm), at.number(0))
    return _scaled_up(at, g, axes, at.add("Mul", at.x, inverse))


@rule("ReduceLogSum", limits=NO_BATCH)
def _log_sum(at: Site, g: Gradient) -> Owed:
    axes = reduced_axes(at)
    tensor = kept(at, at.whole(g), axes, 1)
    inverse = at.add("Exp", at.add("Neg", kept(at, at.y, axes)))
    return [spread(at, at.add("Mul", tensor, inverse), axes, 1)]


@rule("ReduceLogSumExp", limits=NO_BATCH)
def _log_sum_exp(at: Site, g: Gradient) -> Owed:
    axes = reduced_axes(at)
    return _scaled_up(at, g, axes, at.add("Exp", at.add("Sub", at.x, kept(at, at.y, axes))))


@rule("ReduceMax", "ReduceMin", limits=NO_BATCH)
def _extreme(at: Site, g: Gradient) -> Owed:
    axes = reduced_axes(at)
    return [evenly(at, kept(at, at.whole(g), axes, 1), kept(at, at.y, axes), axes)]


def _axis(at: Site) -> int:
    """Return the axis of a function along one, from 0 on, which must not be the batch's."""
    axis: int = at.attribute("axis", -1) % at.rank(at.x)
    at.sizes(at.x, [axis])
    return axis


@rule("Softmax", limits=NO_BATCH)
def _softmax(at: Site, g: Gradient) -> Owed:
    """``y * (g - sum(g * y))``."""
    axis = _axis(at)
    shares = at.add("Mul", at.whole(g), at.y, part="shares")
    mean = at.summed(shares, [axis])
    return [Gradient(at.add("Sub", at.whole(g), mean), at.y)]


@rule("LogSoftmax", limits=NO_BATCH)
def _log_softmax(at: Site, g: Gradient) -> Owed:
    """``g - exp(y) * sum(g)``."""
    tensor = at.whole(g)
    pulled = at.add("Mul", at.summed(tensor, [_axis(at)]), at.add("Exp", at.y))
    return [Gradient(at.add("Sub", tensor, pulled))]


@rule("CumSum", limits="a constant axis")
def _cumsum(at: Site, g: Gradient) -> Owed:
    """Add up from the other end."""
    axis = at.integers(1, "an axis")[0] % at.rank(at.x)
    at.sizes(at.x, [axis])
    tensor, along = at.whole(g), at.array(np.int64(axis + 1), "axis")
    turned = 1 - at.attribute("reverse", 0)
    exclusive = at.attribute("exclusive", 0)
    return [Gradient(at.add("CumSum", tensor, along, exclusive=exclusive, reverse=turned))]
