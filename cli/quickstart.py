"""`ccn-deploy quickstart`."""

from __future__ import annotations


def quickstart() -> None:
    """To be written."""
    raise NotImplementedError
