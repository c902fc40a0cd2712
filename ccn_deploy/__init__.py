"""Robustness of what is actually deployed.

The names below are imported when first used: ``import ccn_deploy`` itself costs nothing and
loads neither torch nor a runtime.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_WHERE = {
    "Bundle": "ccn_deploy.bundle",
    "Model": "ccn_deploy.serving",
    "load": "ccn_deploy.serving",
    "open_bundle": "ccn_deploy.bundle",
    "open_runtime": "ccn_deploy.runtimes",
    "load_dataset": "ccn_deploy.data",
    "CcnDeployError": "ccn_deploy.errors",
}
__all__ = [
    "Bundle",
    "CcnDeployError",
    "Model",
    "__version__",
    "load",
    "load_dataset",
    "open_bundle",
    "open_runtime",
]

if TYPE_CHECKING:
    from ccn_deploy.bundle import Bundle, open_bundle
    from ccn_deploy.data import load_dataset
    from ccn_deploy.errors import CcnDeployError
    from ccn_deploy.runtimes import open_runtime
    from ccn_deploy.serving import Model, load


def __getattr__(name: str) -> Any:
    if name not in _WHERE:
        raise AttributeError(f"module 'ccn_deploy' has no attribute {name!r}")
    return getattr(importlib.import_module(_WHERE[name]), name)
