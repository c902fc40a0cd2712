"""What an operator's function is built from: one node's settings, read once.

An operator is a function that takes a :class:`Call` and returns a function of tensors. Attributes
and constant inputs are looked at when it is built, so that running it costs only torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ccn_deploy.errors import GraphError

Inputs = Sequence[Tensor | None]

Function = Callable[..., Any]
"""Tensors in, a tensor or a tuple of tensors out; None for an optional input that is absent."""

Operator = Callable[["Call"], Function]


@dataclass(frozen=True)
class Call:
    """One node, as its operator sees it.

    Attributes:
        name: The node's, for messages.
        op: Operator.
        attributes: By name.
        opset: Version of the operator set.
        dtype: Type in which all floating-point tensors are computed.
        outputs: Number of outputs that are asked for.
        known: Values of the inputs that are constant; None for the others.
        types: NumPy types that constants have in the file; None for the others.
    """

    name: str
    op: str
    attributes: Mapping[str, Any]
    opset: int
    dtype: torch.dtype
    outputs: int
    known: tuple[Tensor | None, ...]
    types: tuple[np.dtype[Any] | None, ...]

    def get(self, name: str, default: Any = None) -> Any:
        """Return an attribute, or a default where the node has none."""
        return self.attributes.get(name, default)

    def list_at(self, index: int, attribute: str = "") -> Callable[[Inputs], list[Any] | None]:
        """Return a function of a node's inputs that gives a list of numbers, such as axes.

        The list is an attribute in old operator sets and an input in new ones. Constants are read
        here, once; only a computed input is read at each call.
        """
        value = self.get(attribute)
        if value is None and index < len(self.known):
            known = self.known[index]
            value = None if known is None else known.reshape(-1).tolist()
        if value is not None:
            return lambda inputs: value

        def read(inputs: Inputs) -> list[Any] | None:
            tensor = inputs[index] if index < len(inputs) else None
            return None if tensor is None else tensor.detach().reshape(-1).tolist()

        return read

    def number_at(
        self, index: int, attribute: str = "", default: Any = None
    ) -> Callable[[Inputs], Any]:
        """Return a function of a node's inputs that gives one number, such as a bound."""
        if attribute in self.attributes:
            value = self.attributes[attribute]
            return lambda inputs: value
        read = self.list_at(index)

        def number(inputs: Inputs) -> Any:
            found = read(inputs)
            return default if not found else found[0]

        return number

    def refuse(self, why: str) -> GraphError:
        """Build the error for a setting that is not supported."""
        return GraphError(
            f"Node {self.name!r} ({self.op}): {why}.",
            "Export the network again without it.",
        )
