"""Rounding to few bits and back, with the results kept in the type that all is computed in."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from onnx import TensorProto, helper
from torch import Tensor

from ccn_deploy.graph.calls import Call, Function, Operator
from ccn_deploy.graph.ops_shape import NARROW_FLOATS

_RANGES: dict[str, tuple[int, int]] = {
    "int4": (-8, 7),
    "uint4": (0, 15),
    "int8": (-128, 127),
    "uint8": (0, 255),
    "int16": (-32768, 32767),
    "uint16": (0, 65535),
    "int32": (-(2**31), 2**31 - 1),
}

_FLOAT8 = {"float8_e4m3fn": NARROW_FLOATS[17], "float8_e5m2": NARROW_FLOATS[19]}


def _spread(call: Call, values: Tensor, x: Tensor) -> Tensor:
    """Put one value an index of the axis where it broadcasts over ``x``."""
    if values.numel() == 1:
        return values.reshape(())
    if values.dim() != 1:
        raise call.refuse("scales for blocks are not supported")
    axis = call.get("axis", 1) % x.dim()
    return values.view(-1, *[1] * (x.dim() - axis - 1))


def _kind(call: Call) -> str:
    """Return the name of the type that is rounded to."""
    zero: np.dtype[Any] | None = call.types[2] if len(call.types) > 2 else None
    asked = call.get("output_dtype", 0) or TensorProto.UINT8
    kind = (zero or helper.tensor_dtype_to_np_dtype(asked)).name
    if kind not in _RANGES and kind not in _FLOAT8:
        raise call.refuse(f"rounding to {kind} is not supported")
    return kind


def _quantize(call: Call) -> Function:
    kind = _kind(call)

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        scaled = x / _spread(call, scale, x)
        if kind in _FLOAT8:
            largest = torch.finfo(_FLOAT8[kind]).max
            return scaled.clamp(-largest, largest).to(_FLOAT8[kind]).to(x.dtype)
        rounded = scaled.round()
        if zero is not None:
            rounded = rounded + _spread(call, zero.to(x.device, x.dtype), x)
        return rounded.clamp(*_RANGES[kind])

    return run


def _dequantize(call: Call) -> Function:
    if call.get("block_size", 0):
        raise call.refuse("scales for blocks are not supported")

    def run(x: Tensor, scale: Tensor, zero: Tensor | None = None) -> Tensor:
        values = x.to(scale.device, call.dtype)
        if zero is not None:
            values = values - _spread(call, zero.to(values.device, call.dtype), x)
        return values * _spread(call, scale, x)

    return run


OPERATORS: dict[str, Operator] = {"DequantizeLinear": _dequantize, "QuantizeLinear": _quantize}
