"""Operators that join elements along axes: reductions, softmax, products of matrices."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ccn_deploy.graph.calls import Call, Function, Operator
from ccn_deploy.graph.ops_elementwise import guarded_sqrt

Reduction = Callable[[Tensor, tuple[int, ...], bool], Tensor]


def _reduction(function: Reduction) -> Operator:
    """Axes are an attribute in old operator sets, an input in new ones; none means all."""

    def operator(call: Call) -> Function:
        axes, keep = call.list_at(1, "axes"), bool(call.get("keepdims", 1))
        noop = bool(call.get("noop_with_empty_axes", 0))

        def run(*inputs: Tensor) -> Tensor:
            x, wanted = inputs[0], axes(inputs)
            if not wanted and noop:
                return function(x.unsqueeze(0), (0,), False)
            along = tuple(wanted) if wanted else tuple(range(x.dim()))
            return function(x, along, keep) if along else function(x.reshape(1), (0,), False)

        return run

    return operator


def _sum(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.sum(axes, keepdim=keep, dtype=x.dtype)


def _mean(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    if x.is_floating_point():
        return x.mean(axes, keepdim=keep)
    count = math.prod(x.shape[axis] for axis in axes)
    return torch.div(x.sum(axes, keepdim=keep), count, rounding_mode="trunc").to(x.dtype)


def _product(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    for axis in axes:
        x = x.prod(axis, keepdim=True, dtype=x.dtype)
    return x if keep else x.squeeze(axes)


def _sum_of_squares(x: Tensor, axes: tuple[int, ...], keep: bool) -> Tensor:
    return x.square().sum(axes, keepdim=keep, dtype=x.dtype)


def _softmax(function: Callable[[Tensor, int], Tensor]) -> Operator:
    """Before operator set 13 all axes from the given one on count as one."""

    def operator(call: Call) -> Function:
        axis = call.get("axis", -1 if call.opset >= 13 else 1)
        if call.opset >= 13:
            return lambda x: function(x, axis)

        def run(x: Tensor) -> Tensor:
            at = axis % x.dim()
            return function(x.reshape(*x.shape[:at], -1), -1).reshape(x.shape)

        return run

    return operator


def _extreme(find: Callable[[Tensor, int, bool], Tensor]) -> Operator:
    def operator(call: Call) -> Function:
        axis, keep = call.get("axis", 0), bool(call.get("keepdims", 1))
        last = bool(call.get("select_last_index", 0))

        def run(x: Tensor) -> Tensor:
            if not last:
                return find(x, axis, keep)
            from_end: Tensor = find(x.flip(axis), axis, keep)
            return from_end.neg().add(x.shape[axis] - 1)

        return run

    return operator


def _hardmax(x: Tensor, axis: int) -> Tensor:
    return torch.zeros_like(x).scatter(axis, x.argmax(axis, keepdim=True), 1.0)


def _top(call: Call) -> Function:
    count = call.number_at(1, "k")
    axis, largest = call.get("axis", -1), bool(call.get("largest", 1))

    def run(*inputs: Tensor) -> tuple[Tensor, Tensor]:
        # A stable sort: among equals the lower index comes first, as the standard says.
        values, places = inputs[0].sort(dim=axis, descending=largest, stable=True)
        k = int(count(inputs))
        return values.narrow(axis, 0, k), places.narrow(axis, 0, k)

    return run


def _gemm(call: Call) -> Function:
    alpha, beta = call.get("alpha", 1.0), call.get("beta", 1.0)
    turn_x, turn_weight = call.get("transA", 0), call.get("transB", 0)

    def run(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x = x.t() if turn_x else x
        weight = weight.t() if turn_weight else weight
        if bias is not None and bias.dim() <= 2:
            return torch.addmm(bias, x, weight, beta=beta, alpha=alpha)
        product = x @ weight
        return product if alpha == 1 else product * alpha

    return run


def _einsum(call: Call) -> Function:
    equation = call.get("equation").replace(" ", "")
    return lambda *inputs: torch.einsum(equation, *inputs)


OPERATORS: dict[str, Operator] = {
    "ArgMax": _extreme(lambda x, axis, keep: x.argmax(axis, keepdim=keep)),
    "ArgMin": _extreme(lambda x, axis, keep: x.argmin(axis, keepdim=keep)),
    "Einsum": _einsum,
    "Gemm": _gemm,
    "Hardmax": _softmax(_hardmax),
    "LogSoftmax": _softmax(torch.log_softmax),
    "MatMul": lambda call: torch.matmul,
    "ReduceL1": _reduction(lambda x, axes, keep: _sum(x.abs(), axes, keep)),
    "ReduceL2": _reduction(lambda x, axes, keep: guarded_sqrt(_sum_of_squares(x, axes, keep))),
    "ReduceLogSum": _reduction(lambda x, axes, keep: _sum(x, axes, keep).log()),
    "ReduceLogSumExp": _reduction(lambda x, axes, keep: x.logsumexp(axes, keepdim=keep)),
    "ReduceMax": _reduction(lambda x, axes, keep: x.amax(axes, keepdim=keep)),
    "ReduceMean": _reduction(_mean),
    "ReduceMin": _reduction(lambda x, axes, keep: x.amin(axes, keepdim=keep)),
    "ReduceProd": _reduction(_product),
    "ReduceSum": _reduction(_sum),
    "ReduceSumSquare": _reduction(_sum_of_squares),
    "Softmax": _softmax(torch.softmax),
    "TopK": _top,
}
