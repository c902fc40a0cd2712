"""Sums of squares inside the normalisations that are one op, by the ops' definitions."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.graph.graph import Node

Values = NDArray[np.float32]

NORMALISED = (
    "GroupNormalization", "InstanceNormalization", "LRN", "LayerNormalization", "LpNormalization",
    "RMSNormalization",
)  # fmt: skip
"""Ops whose sums of squares :func:`normalised` computes."""


def normalised(node: Node, x: Values) -> tuple[Values, Values, Values]:
    """Return the sums of squares of a normalisation, its divisors, and what it divides.

    Args:
        node: Of one of :data:`NORMALISED`.
        x: What it reads.
    """
    if node.op == "LRN":
        return _local(node, x)
    axis = int(node.attributes.get("axis", -1))
    if node.op == "LpNormalization":
        sums = (x * x).sum(axis=axis)
        return sums, np.sqrt(sums), x
    if node.op == "GroupNormalization":
        x = x.reshape(len(x), int(node.attributes["num_groups"]), -1)
    spatial = node.op in ("InstanceNormalization", "GroupNormalization")
    axes = tuple(range(2 if spatial else axis % x.ndim, x.ndim))
    divided = x if node.op == "RMSNormalization" else x - x.mean(axis=axes, keepdims=True)
    sums = (divided * divided).sum(axis=axes)
    count = np.prod([x.shape[axis] for axis in axes])
    epsilon = np.float32(node.attributes.get("epsilon", 1e-5))
    return sums, np.sqrt(sums / count + epsilon), divided


def _local(node: Node, x: Values) -> tuple[Values, Values, Values]:
    """Local response normalisation: squares are added up over neighbouring channels."""
    size = int(node.attributes["size"])
    before = (size - 1) // 2
    squares = np.pad(x * x, [(0, 0), (before, size - 1 - before)] + [(0, 0)] * (x.ndim - 2))
    sums = sum((squares[:, at : at + x.shape[1]] for at in range(size)), np.zeros_like(x))
    scale = np.float32(node.attributes.get("alpha", 1e-4)) / size
    base = np.float32(node.attributes.get("bias", 1.0)) + scale * sums
    return sums, base ** np.float32(node.attributes.get("beta", 0.75)), x
