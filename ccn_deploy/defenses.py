"""The systems of the paper (section 5), by name, as data.

A defense says which layers are compact, which activation and normalisation are used and which
targets the loss sees. It imports no torch, so that the command line can list and check names
quickly.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.errors import named

SMOOTH_CORRECT = 0.9
"""Target of the true class under label smoothing; the rest is shared by the other classes,
1/90 each for ten classes (paper, section 5, LS)."""


@dataclass(frozen=True)
class Defense:
    """One way of building and training a network.

    Attributes:
        name: What the user types, for example ``"ccn+ls"``.
        title: The paper's name, for example ``"CCN+LS"``.
        compact: Which layers are compact: none, the last linear layer, or all.
        activation: ReLU, or ReLU bounded to [0, 1].
        normalization: What table 9 compares with (section 5.3). ``"batch"``: batch normalisation
            after every convolution and hidden linear layer, before its activation.
            ``"local-response"``: local response normalisation (equation 10) after the activation
            of every convolution, as in AlexNet.
        smooth_labels: Whether the loss sees soft targets.
    """

    name: str
    title: str
    compact: Literal["none", "last", "all"] = "none"
    activation: Literal["relu", "bounded-relu"] = "relu"
    normalization: Literal["none", "batch", "local-response"] = "none"
    smooth_labels: bool = False

    def targets(self, labels: NDArray[np.int64], classes: int) -> NDArray[np.float32]:
        """Return the training targets, float32 [N, classes], rows summing to 1.

        One-hot, or with label smoothing 0.9 for the true class and ``0.1 / (classes - 1)``
        for every other.
        """
        return soft_targets(labels, classes, SMOOTH_CORRECT if self.smooth_labels else 1.0)


def soft_targets(labels: NDArray[np.int64], classes: int, correct: float) -> NDArray[np.float32]:
    """Return targets float32 [N, classes]: ``correct`` for the label, the rest shared equally."""
    off = (1.0 - correct) / (classes - 1)
    targets = np.full((len(labels), classes), off, dtype=np.float32)
    targets[np.arange(len(labels)), labels] = correct
    return targets


DEFENSES: dict[str, Defense] = {
    defense.name: defense
    for defense in (
        Defense("sm", "SM"),
        Defense("ls", "LS", smooth_labels=True),
        Defense("brelu", "BReLU", activation="bounded-relu"),
        Defense("l2sm", "L2SM", compact="last"),
        Defense("ccn", "CCN", compact="all"),
        Defense("ccn+ls", "CCN+LS", compact="all", smooth_labels=True),
        Defense("bn", "BN", normalization="batch"),
        Defense("lrn", "LRN", normalization="local-response"),
    )
}


def defense_named(name: str) -> Defense:
    """Look a defense up by name, case ignored.

    Raises:
        UsageError: No such defense; the hint suggests the nearest.
    """
    return named("defense", name.lower(), DEFENSES)
