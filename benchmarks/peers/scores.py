"""What attacked images are worth, judged alike for every library."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.peers.programs import Victim

TOLERANCE = 1e-6
"""By how much rounding may take a pixel out of the box or a perturbation beyond epsilon."""


@dataclass(frozen=True)
class Score:
    """Of the last word of an attack on N images.

    Attributes:
        adversarial: Proportion that is finite, in the box, near enough and not given its label.
        rho: Mean of the perturbation's L2 norm in the image's, over the adversarial.
        l2: Mean L2 norm of the perturbation, over the adversarial.
        black: How many images are zero everywhere.
    """

    adversarial: float
    rho: float
    l2: float
    black: int


def score(
    victim: Victim, clean: Tensor, labels: Tensor, attacked: Tensor, epsilon: float | None
) -> Score:
    """Score attacked images on what they are meant to fool.

    Args:
        victim: What was attacked.
        clean: Images [N, C, H, W] before.
        labels: The labels to leave, int64 [N].
        attacked: Images after.
        epsilon: Largest allowed perturbation in Linf; None for none.
    """
    change = (attacked - clean).flatten(1)
    flat = attacked.flatten(1)
    legal = flat.isfinite().all(dim=1)
    legal &= (flat >= -TOLERANCE).all(dim=1) & (flat <= 1 + TOLERANCE).all(dim=1)
    if epsilon is not None:
        legal &= change.abs().amax(dim=1) <= epsilon + TOLERANCE
    with torch.no_grad():
        found = victim(torch.where(legal.view(-1, 1, 1, 1), attacked, clean).clamp(0, 1))
    fooled = legal & (found.argmax(dim=1) != labels)
    l2 = change.norm(dim=1)
    return Score(
        adversarial=float(fooled.float().mean()),
        rho=float((l2 / clean.flatten(1).norm(dim=1))[fooled].mean()),
        l2=float(l2[fooled].mean()),
        black=int((flat == 0).all(dim=1).sum()),
    )
