"""Model cards of networks that need not exist."""

from __future__ import annotations

from typing import Any

from ccn_deploy.bundle import ModelCard, Source


def a_card(**changed: Any) -> ModelCard:
    """Return the card of a compact MNIST network, with other fields where they are given."""
    fields: dict[str, Any] = {
        "input_shape": (1, 28, 28),
        "class_names": tuple(str(label) for label in range(10)),
        "architecture": "mnist-cnn",
        "defense": "ccn",
        "source": Source(kind="run", sha256="0" * 64),
        **changed,
    }
    fields.setdefault("name", f"{fields['architecture']}-{fields['defense']}")
    return ModelCard(**fields)
