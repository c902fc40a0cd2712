"""The cross-entropy that attacks climb."""

from __future__ import annotations

import torch
from torch import Tensor


def slope(logits: Tensor, labels: Tensor) -> Tensor:
    """Return the gradient [N, classes] of each cross-entropy with respect to the logits.

    The label's part is the sum of the other probabilities, not its own less one: where a network
    is sure, that difference is rounding, and the step would go anywhere.

    Args:
        logits: [N, classes].
        labels: int64 [N].
    """
    rows = torch.arange(len(labels), device=labels.device)
    found = torch.log_softmax(logits, dim=-1).exp()
    found[rows, labels] = 0.0
    found[rows, labels] = -found.sum(dim=-1)
    return found
