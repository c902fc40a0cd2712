"""Every operator that a graph may use, in torch: ``OPERATORS[op](call)(*inputs)``."""

from __future__ import annotations

from ccn_deploy.graph import (
    ops_elementwise,
    ops_index,
    ops_norm,
    ops_quantize,
    ops_reduce,
    ops_resize,
    ops_shape,
    ops_window,
)
from ccn_deploy.graph.calls import Operator

_MODULES = (
    ops_elementwise, ops_index, ops_norm, ops_quantize, ops_reduce, ops_resize, ops_shape,
    ops_window,
)  # fmt: skip

OPERATORS: dict[str, Operator] = {op: f for part in _MODULES for op, f in part.OPERATORS.items()}
"""By name of the operator, in ONNX's default domain."""
