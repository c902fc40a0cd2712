"""Gradient graphs of any forward graph, by reverse mode; see :mod:`.engine`."""

import importlib

from ccn_deploy.exporters.vjp.engine import gradient_graph
from ccn_deploy.exporters.vjp.table import RULES

__all__ = ["RULES", "gradient_graph"]

for _kind in ("elementwise", "linear", "move", "norm", "pick", "pool", "reduce"):
    importlib.import_module(f"{__name__}.rules_{_kind}")  # enters its rules into the table
