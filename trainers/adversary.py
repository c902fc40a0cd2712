"""Adversarial training as data: which images are crafted, and what is learned of them.

Imports no torch; :mod:`ccn_deploy.trainers.crafting` does what is described here.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

from ccn_deploy.errors import UsageError, named

Kind = Literal["fgsm", "pgd", "trades"]
KINDS: tuple[Kind, ...] = get_args(Kind)

MNIST_SHAPE = (1, 28, 28)
MNIST_EPSILON = 0.3
EPSILON = 8 / 255
"""The paper's strengths for MNIST and for CIFAR-10 (section 5.1), which Madry et al. have too."""

STEPS: dict[Kind, int] = {"fgsm": 1, "pgd": 7, "trades": 10}
"""Steps if none are given: those of Madry et al. and of Zhang et al. for CIFAR-10."""

REACH = 2.5
"""All steps together, relative to epsilon: enough to come to the boundary from anywhere inside
and to move along it (Madry et al. 2018)."""

RISE = 0.2, 0.5
"""Shares of the training between which epsilon rises, for ``pgd`` and ``trades``. Ours: against
epsilon 0.3 from the first step, the paper's MNIST network stays at chance."""

BETA = 6.0
"""What Zhang et al. take for CIFAR-10, 1/lambda in their text."""


@dataclass(frozen=True)
class Adversary:
    """Against what a network is trained: perturbations of at most epsilon in Linf, within [0, 1].

    ``fgsm``: real and crafted images together, half the loss each, crafted by one step of epsilon
    along the sign of the gradient (paper, section 5.1, "Adversarial Training"; Goodfellow et al.
    2015, section 6, https://arxiv.org/abs/1412.6572). ``pgd``: crafted images only, by steps
    from a uniform point of the box (Madry et al. 2018, https://arxiv.org/abs/1706.06083).
    ``trades``: cross-entropy of the clean images plus beta times the divergence of the predictions
    for crafted images from those for clean ones, crafted by steps up that divergence (Zhang et
    al. 2019, algorithm 1, https://arxiv.org/abs/1901.08573).

    Attributes:
        kind: ``"fgsm"``, ``"pgd"`` or ``"trades"``.
        epsilon: Half the width of the box, in pixel values of [0, 1].
        steps: Gradients an image; 1 for ``fgsm``.
        rel_step: Length of a step relative to epsilon; 1 for ``fgsm``.
        beta: Weight of the divergence, for ``trades`` only.
        clean: Share of the training, at its beginning, that sees images as they are.
        full: Share of the training after which epsilon, which rises linearly from there, is whole.

    Raises:
        UsageError: A number out of range, or one that the kind does not have.
    """

    kind: Kind
    epsilon: float
    steps: int = 1
    rel_step: float = 1.0
    beta: float | None = None
    clean: float = 0.0
    full: float = 0.0

    def __post_init__(self) -> None:
        """Refuse what cannot be."""
        _check(self.kind in KINDS, f"The kind is {self.kind!r}.", f"Known: {', '.join(KINDS)}.")
        _check(
            0 < self.epsilon <= 1,
            f"The epsilon of adversarial training is {self.epsilon}.",
            "Give a number above 0 and at most 1, the range of a pixel, such as 0.3 or 8/255.",
        )
        _check(
            self.steps >= 1,
            f"The number of attack steps is {self.steps}.",
            "Give a whole number above 0.",
        )
        _check(
            self.kind != "fgsm" or (self.steps, self.rel_step) == (1, 1.0),
            "FGSM is one step of epsilon.",
            "Leave out --attack-steps, or train with --adversarial pgd.",
        )
        _check(
            0 < self.rel_step < float("inf"),
            f"The length of an attack's step is {self.rel_step}.",
            "Give a number above 0, relative to epsilon.",
        )
        _check(
            (self.beta is None) == (self.kind != "trades"),
            f"{self.kind} {'needs a' if self.kind == 'trades' else 'has no'} beta.",
            f"It weighs the divergence of trades; the authors' is {BETA:g}.",
        )
        _check(
            self.beta is None or 0 < self.beta < float("inf"),
            f"The beta is {self.beta}.",
            f"Give a number above 0; the authors' is {BETA:g}.",
        )
        _check(
            0 <= self.clean <= self.full <= 1,
            f"Epsilon rises from {self.clean} to {self.full} of the training.",
            "Give shares of it, from 0 to 1.",
        )

    def epsilon_at(self, step: int, steps: int) -> float:
        """Return epsilon at a step of the training, counted from 0, of so many in all."""
        since = step + 1 - self.clean * steps
        rising = (self.full - self.clean) * steps
        if since <= 0:
            return 0.0
        return self.epsilon * min(1.0, since / rising) if rising else self.epsilon


def default_adversary(kind: str, input_shape: tuple[int, int, int]) -> Adversary:
    """Return a kind as its authors have it, as strong as is usual for images of that shape.

    Raises:
        UsageError: No such kind; the hint suggests the nearest.
    """
    known = named("adversarial training", kind.lower(), {name: name for name in KINDS})
    steps = STEPS[known]
    clean, full = (0.0, 0.0) if known == "fgsm" else RISE
    return Adversary(
        known,
        MNIST_EPSILON if input_shape == MNIST_SHAPE else EPSILON,
        steps=steps,
        rel_step=_rel_step(steps),
        beta=BETA if known == "trades" else None,
        clean=clean,
        full=full,
    )


def changed(
    adversary: Adversary,
    *,
    epsilon: float | None = None,
    steps: int | None = None,
    beta: float | None = None,
) -> Adversary:
    """Return an adversary with numbers replaced.

    The length of a step follows from their number, so that they reach as far.

    Raises:
        UsageError: A number out of range, or one that the kind does not have.
    """
    if epsilon is not None:
        adversary = replace(adversary, epsilon=epsilon)
    if steps is not None:
        rel_step = _rel_step(steps) if steps >= 1 else adversary.rel_step
        adversary = replace(adversary, steps=steps, rel_step=rel_step)
    return adversary if beta is None else replace(adversary, beta=beta)


def _rel_step(steps: int) -> float:
    return min(1.0, REACH / steps)


def _check(holds: bool, what: str, hint: str) -> None:
    if not holds:
        raise UsageError(what, hint)
