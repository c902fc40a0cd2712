"""`ccn-deploy verify-parity`."""

from __future__ import annotations


def verify_parity() -> None:
    """To be written."""
    raise NotImplementedError
