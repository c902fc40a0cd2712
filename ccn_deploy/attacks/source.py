"""Where the gradients of an attack on a runtime come from. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

from ccn_deploy.errors import RuntimeUnavailableError, unknown

Gradient = Literal["native", "reference", "transfer"]

GRADIENTS: Mapping[Gradient, str] = MappingProxyType(
    {
        "native": "the runtime's own",
        "reference": "of the PyTorch reference, at the images that the runtime answers for",
        "transfer": "of the PyTorch reference, on which the images were crafted wholly",
    }
)
"""Every source, with a line for people. In all of them the runtime has the last word."""


def source(name: str) -> Gradient:
    """Read the name of a source.

    Raises:
        UsageError: No such source; the hint suggests the nearest.
    """
    for known in GRADIENTS:
        if name.lower() == known:
            return known
    raise unknown("source of gradients", name, GRADIENTS)


def no_gradients(target: str) -> RuntimeUnavailableError:
    """Return the error for a runtime that is asked for gradients of its own and has none."""
    return RuntimeUnavailableError(
        f"{target} gives no gradients of its own.",
        "Export it again without --no-gradient, or attack with gradients of the PyTorch "
        "reference, the bundle's forward graph (--gradient reference).",
    )
