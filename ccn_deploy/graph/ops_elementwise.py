"""Operators that treat every element alike, in torch."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from ccn_deploy.graph.calls import Call, Function, Operator
from ccn_deploy.layers import SQUARE_FLOOR


def guarded_sqrt(x: Tensor) -> Tensor:
    """Return the root, with slope 0 below the floor: at an all-zero patch it would be infinite.

    The slope is that of :func:`ccn_deploy.layers.guarded_sqrt`; the value is the graph's own.
    """
    if not (x.requires_grad and torch.is_grad_enabled()):
        return x.sqrt()
    return torch.where(x < SQUARE_FLOOR, x.detach().sqrt(), x.clamp_min(SQUARE_FLOOR).sqrt())


def _plain(function: Callable[..., Tensor]) -> Operator:
    return lambda call: function


def _set(function: Callable[..., Tensor], **defaults: Any) -> Operator:
    """Hand attributes over by their names; ``defaults`` are those of the standard."""

    def operator(call: Call) -> Function:
        settings = {name: call.get(name, value) for name, value in defaults.items()}
        return lambda x: function(x, **settings)

    return operator


def _binary(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    """Broadcast as NumPy does; before operator set 7 an attribute said where to begin."""

    def operator(call: Call) -> Function:
        axis = call.get("axis")
        if axis is None or call.opset >= 7:
            return function

        def run(x: Tensor, y: Tensor) -> Tensor:
            after = x.dim() - axis % x.dim() - y.dim()
            return function(x, y.reshape(*y.shape, *[1] * after))

        return run

    return operator


def _divide(x: Tensor, y: Tensor) -> Tensor:
    if x.is_floating_point():
        return x / y
    return torch.div(x, y, rounding_mode="trunc")


def _power(call: Call) -> Function:
    exponent = call.number_at(1)
    if call.known[1] is None or call.known[1].numel() != 1:
        return lambda x, y: torch.pow(x, y).to(x.dtype)
    value = exponent(())

    def run(x: Tensor, *_: Tensor) -> Tensor:
        if value == 2:
            return x.square()
        if value == 0.5:
            return guarded_sqrt(x)
        return torch.pow(x, value).to(x.dtype)

    return run


def _fold(function: Callable[[Tensor, Tensor], Tensor]) -> Operator:
    def run(first: Tensor, *rest: Tensor) -> Tensor:
        for tensor in rest:
            first = function(first, tensor)
        return first

    return lambda call: run


def _mean(first: Tensor, *rest: Tensor) -> Tensor:
    total = first
    for tensor in rest:
        total = total + tensor
    return total / (1 + len(rest))


def _clip(call: Call) -> Function:
    low, high = call.number_at(1, "min"), call.number_at(2, "max")

    def run(*inputs: Tensor) -> Tensor:
        least, most = low(inputs), high(inputs)
        x = inputs[0]
        if least is not None and most is not None and least > most:
            return torch.full_like(x, most)  # as the standard says; torch agrees, save the slope
        return x if least is None and most is None else x.clamp(least, most)

    return run


def _leaky_relu(call: Call) -> Function:
    slope = call.get("alpha", 0.01)
    return lambda x: F.leaky_relu(x, slope)


def _prelu(call: Call) -> Function:
    by_channel = call.opset < 7  # one slope a channel, before slopes were broadcast

    def run(x: Tensor, slope: Tensor) -> Tensor:
        if by_channel and slope.numel() > 1:
            slope = slope.view(-1, *[1] * (x.dim() - 2))
        return torch.where(x < 0, x * slope, x)

    return run


def _shrink(call: Call) -> Function:
    bias, edge = call.get("bias", 0.0), call.get("lambd", 0.5)

    def run(x: Tensor) -> Tensor:
        inner = torch.where(x > edge, x - bias, torch.zeros_like(x))
        return torch.where(x < -edge, x + bias, inner)

    return run


def _is_infinite(call: Call) -> Function:
    low, high = call.get("detect_negative", 1), call.get("detect_positive", 1)
    return lambda x: torch.isinf(x) & ((x < 0) & bool(low) | (x > 0) & bool(high))


OPERATORS: dict[str, Operator] = {
    "Abs": _plain(torch.abs),
    "Acos": _plain(torch.acos),
    "Acosh": _plain(torch.acosh),
    "Add": _binary(torch.add),
    "And": _binary(torch.logical_and),
    "Asin": _plain(torch.asin),
    "Asinh": _plain(torch.asinh),
    "Atan": _plain(torch.atan),
    "Atanh": _plain(torch.atanh),
    "Ceil": _plain(torch.ceil),
    "Celu": _set(F.celu, alpha=1.0),
    "Clip": _clip,
    "Cos": _plain(torch.cos),
    "Cosh": _plain(torch.cosh),
    "Div": _binary(_divide),
    "Elu": _set(F.elu, alpha=1.0),
    "Equal": _binary(torch.eq),
    "Erf": _plain(torch.erf),
    "Exp": _plain(torch.exp),
    "Floor": _plain(torch.floor),
    "Gelu": _set(F.gelu, approximate="none"),
    "Greater": _binary(torch.gt),
    "GreaterOrEqual": _binary(torch.ge),
    "HardSigmoid": _set(lambda x, alpha, beta: (x * alpha + beta).clamp(0, 1), alpha=0.2, beta=0.5),
    "HardSwish": _plain(F.hardswish),
    "IsInf": _is_infinite,
    "IsNaN": _plain(torch.isnan),
    "LeakyRelu": _leaky_relu,
    "Less": _binary(torch.lt),
    "LessOrEqual": _binary(torch.le),
    "Log": _plain(torch.log),
    "Max": _fold(torch.maximum),
    "Mean": _plain(_mean),
    "Min": _fold(torch.minimum),
    "Mish": _plain(F.mish),
    "Mod": lambda call: torch.fmod if call.get("fmod", 0) else torch.remainder,
    "Mul": _binary(torch.mul),
    "Neg": _plain(torch.neg),
    "Not": _plain(torch.logical_not),
    "Or": _binary(torch.logical_or),
    "PRelu": _prelu,
    "Pow": _power,
    "Reciprocal": _plain(torch.reciprocal),
    "Relu": _plain(torch.relu),
    "Round": _plain(torch.round),
    "Selu": _set(
        lambda x, alpha, gamma: gamma * F.elu(x, alpha),
        alpha=1.67326319217681884765625,
        gamma=1.05070102214813232421875,
    ),
    "Shrink": _shrink,
    "Sigmoid": _plain(torch.sigmoid),
    "Sign": _plain(torch.sign),
    "Sin": _plain(torch.sin),
    "Sinh": _plain(torch.sinh),
    # torch's default threshold, 20, is a float32 one: in float64 it errs by 2e-9.
    "Softplus": _plain(lambda x: F.softplus(x, threshold=40.0)),
    "Softsign": _plain(F.softsign),
    "Sqrt": _plain(guarded_sqrt),
    "Sub": _binary(torch.sub),
    "Sum": _fold(torch.add),
    "Swish": _set(lambda x, alpha: x * torch.sigmoid(alpha * x), alpha=1.0),
    "Tan": _plain(torch.tan),
    "Tanh": _plain(torch.tanh),
    "ThresholdedRelu": _set(
        lambda x, alpha: torch.where(x > alpha, x, torch.zeros_like(x)), alpha=1.0
    ),
    "Where": _plain(lambda condition, x, y: torch.where(condition.to(x.device), x, y)),
    "Xor": _binary(torch.logical_xor),
}
