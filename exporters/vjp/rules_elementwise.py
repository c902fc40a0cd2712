"""Rules of arithmetic with broadcasting, and of functions of one number.

At a bend the slope is PyTorch's: 0 for Relu at 0, 1 for Clip at its limits, one half each for Max
and Min of two equal numbers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from onnx import TensorProto

from ccn_deploy.exporters.vjp.table import Slope, rule, slope
from ccn_deploy.exporters.vjp.tape import Gradient, Site
from ccn_deploy.layers import SQUARE_FLOOR

Owed = Sequence[Gradient | None]


def owed(at: Site, index: int, g: Gradient) -> Gradient | None:
    """Return what an input that was broadcast gets of a gradient of the output's shape."""
    if not at.needed(index):
        return None
    if at.shape(at.node.inputs[index]) == at.shape(at.y):
        return g
    return at.sum_like(at.whole(g), index)


@rule("Identity", "Dropout")
def _same(at: Site, g: Gradient) -> Owed:
    return [g]


@rule("Cast", limits="to float32 only")
def _cast(at: Site, g: Gradient) -> Owed:
    if at.attribute("to") != TensorProto.FLOAT:
        at.refuse("goes on in another precision than float32")
    return [g]


@rule("Add", "Sum")
def _add(at: Site, g: Gradient) -> Owed:
    return [owed(at, index, g) for index in range(len(at.node.inputs))]


@rule("Mean")
def _mean(at: Site, g: Gradient) -> Owed:
    return _add(at, at.times(g, 1 / len(at.node.inputs)))


@rule("Sub")
def _sub(at: Site, g: Gradient) -> Owed:
    taken = owed(at, 1, g)
    return [owed(at, 0, g), taken and at.times(taken, -1)]


@rule("Neg")
def _neg(at: Site, g: Gradient) -> Owed:
    return [at.times(g, -1)]


@rule("Mul")
def _mul(at: Site, g: Gradient) -> Owed:
    a, b = at.node.inputs
    if a == b:
        return [at.scaled(g, at.add("Mul", a, at.number(2)))]
    return [
        owed(at, index, at.scaled(g, other)) if at.needed(index) else None
        for index, other in ((0, b), (1, a))
    ]


@rule("Div")
def _div(at: Site, g: Gradient) -> Owed:
    """``d(a / b) = (da - (a / b) db) / b``, divided once per image."""
    divisor = at.value(1)
    if divisor is None:
        inverse = at.add("Reciprocal", at.node.inputs[1])
    else:
        inverse = at.array(1 / divisor.astype(np.float64), "inverse")
    flow = at.scaled(g, inverse)
    pulled = None
    if at.needed(1):
        if at.shape(at.node.inputs[1]) == at.shape(at.y):
            pulled = at.scaled(flow, at.add("Neg", at.y))
        else:
            shares = at.add("Mul", at.whole(flow), at.y, part="shares")
            pulled = at.times(at.sum_like(shares, 1), -1)
    return [owed(at, 0, flow), pulled]


@rule("Pow")
def _pow(at: Site, g: Gradient) -> Owed:
    base, exponent = None, None
    if at.needed(0):
        base = owed(at, 0, at.scaled(g, _power_slope(at)))
    if at.needed(1):
        log = at.add("Log", at.x)
        exponent = owed(at, 1, at.scaled(g, at.add("Mul", at.y, log)))
    return [base, exponent]


def _power_slope(at: Site) -> str:
    """Add ``p * x**(p - 1)``, without Pow where the exponent allows it."""
    p = at.value(1)
    if p is None:
        less = at.add("Sub", at.node.inputs[1], at.number(1))
        return at.add("Mul", at.add("Pow", at.x, less), at.node.inputs[1])
    p = p.astype(np.float64)
    one = p.item() if p.size == 1 else None
    if one == 1:
        return at.number(1)
    if one == 2:
        return at.add("Mul", at.x, at.number(2))
    if one == 0.5:
        return _root_slope(at)
    return at.add("Mul", at.add("Pow", at.x, at.array(p - 1, "less")), at.array(p, "exponent"))


@rule("Where")
def _where(at: Site, g: Gradient) -> Owed:
    condition = at.x
    found: list[Gradient | None] = [None]
    for index in (1, 2):
        if at.needed(index):
            chosen = condition if index == 1 else at.add("Not", condition)
            found.append(owed(at, index, at.scaled(g, at.floats(chosen))))
        else:
            found.append(None)
    return found


@rule("Max", "Min")
def _extreme(at: Site, g: Gradient) -> Owed:
    """Go back through pairs: equal ones share evenly, as in ``torch.maximum``."""
    op, inputs = at.node.op, at.node.inputs
    so_far = [inputs[0]]
    for name in inputs[1:-1]:
        so_far.append(at.add(op, so_far[-1], name))
    found: list[Gradient | None] = []
    for index in range(len(inputs) - 1, 0, -1):
        pair = (inputs[index], so_far[index - 1])
        wins = at.floats(at.add("Greater" if op == "Max" else "Less", *pair))
        share = at.add("Where", at.add("Equal", *pair), at.number(0.5), wins)
        found.append(owed(at, index, at.scaled(g, share)) if at.needed(index) else None)
        g = at.scaled(g, at.add("Sub", at.number(1), share))
    found.append(owed(at, 0, g))
    return found[::-1]


@rule("Clip", limits="limits constant or not dependent on the images")
def _clip(at: Site, g: Gradient) -> Owed:
    """Pass where nothing is clipped, the limits themselves included, as in PyTorch.

    Not where input and output are equal: a runtime may round the one and not the other.
    """
    if at.needed(1) or at.needed(2):
        at.refuse("has limits that depend on the images")
    sides = [
        at.add(op, at.x, at.node.inputs[index])
        for index, op in ((1, "GreaterOrEqual"), (2, "LessOrEqual"))
        if at.given(index)
    ]
    if not sides:
        return [g]
    passing = sides[0] if len(sides) == 1 else at.add("And", *sides)
    return [at.scaled(g, at.floats(passing))]


def _positive(at: Site, otherwise: str) -> str:
    """Return 1 where x is positive and something else where it is not."""
    return at.add("Where", at.add("Greater", at.x, at.number(0)), at.number(1), otherwise)


@rule("PRelu", limits="slope not dependent on the images")
def _prelu(at: Site, g: Gradient) -> Owed:
    if at.needed(1):
        at.refuse("has a slope that depends on the images")
    return [at.scaled(g, _positive(at, at.node.inputs[1]))]


@slope("Elu")
def _elu(at: Site) -> str:
    alpha = at.attribute("alpha", 1.0)
    return _positive(at, at.add("Mul", at.add("Exp", at.x), at.number(alpha)))


@slope("Selu")
def _selu(at: Site) -> str:
    alpha = at.attribute("alpha", 1.6732632423543772)
    gamma = at.attribute("gamma", 1.0507009873554805)
    low = at.add("Mul", at.add("Exp", at.x), at.number(alpha * gamma))
    return at.add("Where", at.add("Greater", at.x, at.number(0)), at.number(gamma), low)


@slope("Celu")
def _celu(at: Site) -> str:
    alpha = at.attribute("alpha", 1.0)
    return _positive(at, at.add("Exp", at.add("Mul", at.x, at.number(1 / alpha))))


@slope("HardSigmoid")
def _hard_sigmoid(at: Site) -> str:
    """As Clip of a line: the limits themselves pass."""
    alpha, beta = at.attribute("alpha", 0.2), at.attribute("beta", 0.5)
    line = at.add("Add", at.add("Mul", at.x, at.number(alpha)), at.number(beta), part="line")
    above = at.add("GreaterOrEqual", line, at.number(0))
    below = at.add("LessOrEqual", line, at.number(1))
    return at.add("Mul", at.floats(at.add("And", above, below)), at.number(alpha))


@slope("HardSwish")
def _hard_swish(at: Site) -> str:
    between = at.add("Add", at.add("Mul", at.x, at.number(1 / 3)), at.number(0.5))
    below = at.add("Where", at.add("Less", at.x, at.number(3)), between, at.number(1))
    return at.add("Where", at.add("LessOrEqual", at.x, at.number(-3)), at.number(0), below)


@slope("Softsign")
def _softsign(at: Site) -> str:
    inverse = at.add("Reciprocal", at.add("Add", at.add("Abs", at.x), at.number(1)))
    return at.add("Mul", inverse, inverse)


@slope("Mish")
def _mish(at: Site) -> str:
    """``t + x * sigmoid(x) * (1 - t**2)`` with ``t = tanh(softplus(x))``."""
    t = at.add("Tanh", at.add("Softplus", at.x))
    rest = at.add("Sub", at.number(1), at.add("Mul", t, t))
    return at.add("Add", t, at.add("Mul", at.add("Mul", at.x, at.add("Sigmoid", at.x)), rest))


@slope("Swish")
def _swish(at: Site) -> str:
    """``s + alpha * y * (1 - s)`` with ``s = sigmoid(alpha x)`` and ``y = x s``."""
    alpha = at.number(at.attribute("alpha", 1.0))
    s = at.add("Sigmoid", at.add("Mul", at.x, alpha))
    rest = at.add("Mul", at.add("Sub", at.number(1), s), alpha)
    return at.add("Add", s, at.add("Mul", at.y, rest))


@slope("Gelu")
def _gelu(at: Site) -> str:
    square = at.add("Mul", at.x, at.x)
    if at.attribute("approximate", "none") == "none":
        scaled = at.add("Mul", at.x, at.number(1 / math.sqrt(2)))
        erf = at.add("Add", at.add("Erf", scaled), at.number(1))
        density = at.add("Exp", at.add("Mul", square, at.number(-0.5)))
        bell = at.add("Mul", density, at.number(1 / math.sqrt(2 * math.pi)))
        half = at.add("Mul", erf, at.number(0.5))
        return at.add("Add", half, at.add("Mul", at.x, bell))
    root, cubic = math.sqrt(2 / math.pi), 0.044715
    inner = at.add("Add", at.add("Mul", square, at.number(root * cubic)), at.number(root))
    t = at.add("Tanh", at.add("Mul", at.x, inner))
    steep = at.add("Add", at.add("Mul", square, at.number(3 * root * cubic)), at.number(root))
    rest = at.add("Sub", at.number(1), at.add("Mul", t, t))
    bend = at.add("Mul", at.add("Mul", at.x, steep), rest)
    both = at.add("Add", at.add("Add", t, at.number(1)), bend)
    return at.add("Mul", both, at.number(0.5))


@slope("Erf")
def _erf(at: Site) -> str:
    bell = at.add("Exp", at.add("Neg", at.add("Mul", at.x, at.x)))
    return at.add("Mul", bell, at.number(2 / math.sqrt(math.pi)))


def _root_slope(at: Site) -> str:
    """Add ``1 / (2 y)``, but 0 where x is below the floor that keeps gradients finite.

    See :func:`ccn_deploy.layers.guarded_sqrt`: the norm of an all-zero patch counts as constant.
    """
    steep = at.add("GreaterOrEqual", at.x, at.number(SQUARE_FLOOR))
    return at.add("Where", steep, at.add("Div", at.number(0.5), at.y), at.number(0))


SLOPES: dict[str, Slope] = {
    "Abs": lambda at: at.add("Sign", at.x),
    "Atan": lambda at: at.add("Reciprocal", at.add("Add", at.add("Mul", at.x, at.x), at.number(1))),
    "Cos": lambda at: at.add("Neg", at.add("Sin", at.x)),
    "Cosh": lambda at: at.add("Sinh", at.x),
    "Exp": lambda at: at.y,
    "LeakyRelu": lambda at: _positive(at, at.number(at.attribute("alpha", 0.01))),
    "Log": lambda at: at.add("Reciprocal", at.x),
    "Reciprocal": lambda at: at.add("Neg", at.add("Mul", at.y, at.y)),
    "Relu": lambda at: at.floats(at.add("Greater", at.y, at.number(0))),
    "Sigmoid": lambda at: at.add("Mul", at.y, at.add("Sub", at.number(1), at.y)),
    "Sin": lambda at: at.add("Cos", at.x),
    "Sinh": lambda at: at.add("Cosh", at.x),
    "Softplus": lambda at: at.add("Sigmoid", at.x),
    "Sqrt": _root_slope,
    "Tanh": lambda at: at.add("Sub", at.number(1), at.add("Mul", at.y, at.y)),
    "ThresholdedRelu": lambda at: at.floats(
        at.add("Greater", at.x, at.number(at.attribute("alpha", 1.0)))
    ),
}
"""Derivatives that are one line."""

for _op, _derivative in SLOPES.items():
    slope(_op)(_derivative)
