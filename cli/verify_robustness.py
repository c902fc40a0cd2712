"""`ccn-deploy verify-robustness`."""

from __future__ import annotations


def verify_robustness() -> None:
    """To be written."""
    raise NotImplementedError
