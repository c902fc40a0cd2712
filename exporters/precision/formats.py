"""The number formats that a graph can be converted to."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from onnx import TensorProto

from ccn_deploy.graph.builder import IR_VERSION, OPSET


@dataclass(frozen=True)
class Format:
    """A low-precision number.

    Attributes:
        precision: Its name in bundles, for example ``"fp16"``.
        onnx: Its ``TensorProto`` type.
        torch: Its dtype in torch, whose conversions round to the nearest even.
        opset: The lowest whose convolution takes it, and no lower than that of other graphs.
        ir_version: The file format that came with that opset.
        largest: Of a grid, the largest number that is used.
    """

    precision: str
    onnx: int
    torch: torch.dtype
    opset: int = OPSET
    ir_version: int = IR_VERSION
    largest: float = math.inf


HALVES = {
    "fp16": Format("fp16", TensorProto.FLOAT16, torch.float16),
    "bf16": Format("bf16", TensorProto.BFLOAT16, torch.bfloat16, opset=22, ir_version=10),
}
"""Floating-point formats that a graph computes in."""

GRIDS = {
    "int8": Format("int8", TensorProto.INT8, torch.int8, largest=127.0),
    "fp8": Format("fp8", TensorProto.FLOAT8E4M3FN, torch.float8_e4m3fn, largest=448.0),
}
"""Formats that tensors are put on by a scale. int8 leaves -128 out, to be symmetric."""


def encoded(name: str, values: NDArray[np.float32], to: Format) -> TensorProto:
    """Return a constant of another format, each value rounded to the nearest.

    Integers are rounded half to even, as QuantizeLinear does; values must be in range.
    """
    tensor = torch.tensor(values)
    tensor = tensor.round() if not to.torch.is_floating_point else tensor
    low = tensor.to(to.torch).reshape(-1).view(torch.uint8).numpy()
    return onnx.helper.make_tensor(name, to.onnx, values.shape, low.tobytes(), raw=True)


def rounded(values: NDArray[np.float32], to: Format) -> NDArray[np.float32]:
    """Return the nearest values of a format, in float32."""
    found: NDArray[np.float32] = torch.tensor(values).to(to.torch).float().numpy()
    return found
