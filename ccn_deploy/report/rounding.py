"""Whether attacked images still fool a target once they are stored with 8 bits a channel.

Attacks move pixels by less than one of 256 steps where that helps them; an image file rounds that
away. What survives is what can be handed over as a file.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.robustness import Evidence

Answer = Callable[[NDArray[np.float32]], NDArray[np.int64]]
"""Maps images float32 [N, C, H, W] in [0, 1] to the labels int64 [N] that a target gives them."""

BATCH = 100
"""Images asked about at a time."""


def to_8_bits(images: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Return images in [0, 1] as an image file holds them: the nearest of 256 steps each."""
    steps: NDArray[np.uint8] = np.rint(np.clip(images, 0.0, 1.0) * 255).astype(np.uint8)
    return steps


def fooled_in_8_bits(evidence: Evidence, answer: Answer) -> tuple[int, int]:
    """Return how many images fooled a target, and how many of them do as 8-bit images.

    Args:
        evidence: Of one attack, with its images.
        answer: Of the target that was attacked.

    Raises:
        IntegrityError: The images are not those that were kept.
        ValueError: The evidence has no images, or an answer is not one label an image.
    """
    fooled = np.flatnonzero(evidence.status == "fooled")
    still = 0
    for start in range(0, len(fooled), BATCH):
        rows = fooled[start : start + BATCH]
        rounded = to_8_bits(evidence.adversarial(rows)).astype(np.float32) / np.float32(255)
        labels = answer(rounded)
        if labels.shape != rows.shape:
            raise ValueError(f"{len(rows)} images were answered with labels {labels.shape}")
        still += int((labels != evidence.label[rows]).sum())
    return len(fooled), still
