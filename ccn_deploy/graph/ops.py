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

OPERATORS: dict[str, Operator] = {
    **ops_elementwise.OPERATORS,
    **ops_index.OPERATORS,
    **ops_norm.OPERATORS,
    **ops_quantize.OPERATORS,
    **ops_reduce.OPERATORS,
    **ops_resize.OPERATORS,
    **ops_shape.OPERATORS,
    **ops_window.OPERATORS,
}
"""By name of the operator, in ONNX's default domain."""
