"""Operators that pick elements by an index, or depend on where elements stand.

Indices that are constants stay on the CPU and follow the tensor that they pick from.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ccn_deploy.graph.calls import Call, Function, Operator


def _gather(call: Call) -> Function:
    axis = call.get("axis", 0)
    known = call.known[1]
    single = known.item() if known is not None and known.dim() == 0 else None

    def run(x: Tensor, indices: Tensor) -> Tensor:
        at = axis % x.dim()
        if single is not None:
            return x.select(at, int(single))
        flat = indices.to(x.device, torch.int64).reshape(-1)
        flat = torch.where(flat < 0, flat + x.shape[at], flat)
        picked = x.index_select(at, flat)
        return picked.reshape(*x.shape[:at], *indices.shape, *x.shape[at + 1 :])

    return run


def _gather_elements(call: Call) -> Function:
    axis = call.get("axis", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        places = indices.to(x.device, torch.int64)
        return x.gather(axis, torch.where(places < 0, places + x.shape[axis], places))

    return run


def _gather_nd(call: Call) -> Function:
    shared = call.get("batch_dims", 0)

    def run(x: Tensor, indices: Tensor) -> Tensor:
        places = indices.to(x.device, torch.int64)
        if not shared:
            return x[tuple(places.unbind(-1))]
        lead = x.shape[:shared]
        flat, where = x.reshape(-1, *x.shape[shared:]), places.reshape(-1, *places.shape[shared:])
        rows = [a[tuple(b.unbind(-1))] for a, b in zip(flat, where, strict=True)]
        return torch.stack(rows).reshape(*lead, *rows[0].shape)

    return run


def _scatter_nd(call: Call) -> Function:
    how = call.get("reduction", "none")
    if how not in ("none", "add"):
        raise call.refuse(f"the reduction {how!r} is not supported")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = tuple(indices.to(x.device, torch.int64).unbind(-1))
        return x.index_put(places, updates.to(x.device), accumulate=how == "add")

    return run


def _scatter_elements(call: Call) -> Function:
    axis, how = call.get("axis", 0), call.get("reduction", "none")
    if how not in ("none", "add"):
        raise call.refuse(f"the reduction {how!r} is not supported")

    def run(x: Tensor, indices: Tensor, updates: Tensor) -> Tensor:
        places = indices.to(x.device, torch.int64)
        places = torch.where(places < 0, places + x.shape[axis], places)
        return (x.scatter_add if how == "add" else x.scatter)(axis, places, updates.to(x.device))

    return run


def _cumulative_sum(call: Call) -> Function:
    along = call.number_at(1)
    exclusive, backward = call.get("exclusive", 0), call.get("reverse", 0)

    def run(*inputs: Tensor) -> Tensor:
        x, axis = inputs[0], along(inputs)
        x = x.flip(axis) if backward else x
        sums = x.cumsum(axis, dtype=x.dtype)
        sums = sums - x if exclusive else sums
        return sums.flip(axis) if backward else sums

    return run


def _one_hot(call: Call) -> Function:
    axis = call.get("axis", -1)
    depth = call.number_at(1)

    def run(*inputs: Tensor) -> Tensor:
        indices, values, count = inputs[0].to(torch.int64), inputs[2], int(depth(inputs))
        places = torch.where(indices < 0, indices + count, indices).unsqueeze(axis)
        at = axis % places.dim()
        steps = torch.arange(count, device=indices.device)
        chosen = places == steps.view(-1, *[1] * (places.dim() - at - 1))
        return torch.where(chosen, values[1], values[0])

    return run


def _trilu(call: Call) -> Function:
    cut: Callable[..., Tensor] = torch.triu if call.get("upper", 1) else torch.tril
    diagonal = call.number_at(1, default=0)
    return lambda *inputs: cut(inputs[0], diagonal(inputs))


OPERATORS: dict[str, Operator] = {
    "CumSum": _cumulative_sum,
    "Gather": _gather,
    "GatherElements": _gather_elements,
    "GatherND": _gather_nd,
    "NonZero": lambda call: lambda x: x.nonzero().T,
    "OneHot": _one_hot,
    "ScatterElements": _scatter_elements,
    "ScatterND": _scatter_nd,
    "Trilu": _trilu,
}
