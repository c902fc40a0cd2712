"""Gradient graphs of any forward graph, by reverse mode; see :mod:`.engine`."""

from ccn_deploy.exporters.vjp import (
    rules_elementwise,
    rules_linear,
    rules_move,
    rules_norm,
    rules_pick,
    rules_pool,
    rules_reduce,
)
from ccn_deploy.exporters.vjp.engine import gradient_graph
from ccn_deploy.exporters.vjp.table import RULES

__all__ = ["RULES", "gradient_graph"]
