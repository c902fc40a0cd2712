"""Names of the inputs and outputs of a bundle's graphs. Imports nothing."""

from __future__ import annotations

INPUT = "images"
"""float32 [batch, C, H, W] in [0, 1]."""

OUTPUT = "logits"
"""float32 [batch, classes]."""

COTANGENTS = "cotangents"
"""float32 [batch, candidates, classes]: second input of a gradient graph."""

GRADIENTS = "gradients"
"""float32 [batch, candidates, C, H, W]: second output of a gradient graph."""

BATCH = "batch"
"""Name of the symbolic first dimension of input and output."""

CANDIDATES = "candidates"
"""Name of the symbolic second dimension of cotangents and gradients."""
