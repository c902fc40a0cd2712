"""The cross-entropy that attacks climb."""

from __future__ import annotations

import torch
from torch import Tensor

from ccn_deploy.attacks.passes import Pass


def ascent(here: Pass, labels: Tensor, rows: Tensor) -> Tensor:
    """Return the sign [n, C, H, W] of the gradient of the cross-entropy at some images.

    Args:
        here: A forward pass at N images.
        labels: int64 [N].
        rows: The places of the images, int64 [n].
    """
    slope = torch.log_softmax(here.logits[rows], dim=-1).exp()
    slope[torch.arange(len(rows), device=rows.device), labels[rows]] -= 1.0
    return here.gradients(rows, slope[:, None])[:, 0].sign()
