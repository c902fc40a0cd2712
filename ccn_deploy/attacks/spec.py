"""Attacks as data: which, how strong, with which settings. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Literal

from ccn_deploy.errors import UsageError, named

Norm = Literal["linf", "l2"]
Setting = int | float | bool


@dataclass(frozen=True)
class AttackSpec:
    """One attack with every setting that shapes its result.

    Attributes:
        name: A name in :data:`ATTACKS`.
        norm: In which the perturbation is small.
        epsilon: Largest allowed perturbation in that norm, in pixel values of [0, 1]; None for
            an attack that looks for the smallest perturbation instead.
        clip: Whether adversarial images stay in [0, 1].
        parameters: The attack's own settings, by name.
    """

    name: str
    norm: Norm
    epsilon: float | None = None
    clip: bool = True
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)

    @property
    def title(self) -> str:
        """What tables call it, without its strength; the name of an attack that is not ours."""
        return title_of(self.name)

    @property
    def cost(self) -> float:
        """Roughly how many gradients an image takes, to tell the time left."""
        return ATTACKS[self.name].cost(self.parameters) if self.name in ATTACKS else 1.0

    @property
    def label(self) -> str:
        """Name in file names and test ids, for example ``"linf-0.1-pgd"``."""
        parts = [
            self.norm,
            "" if self.epsilon is None else f"{self.epsilon:g}",
            self.name,
            "" if self.clip else "unclipped",
        ]
        return "-".join(part for part in parts if part)

    def document(self) -> dict[str, Any]:
        """Return everything that shapes the result, as JSON."""
        return {
            "name": self.name,
            "norm": self.norm,
            "epsilon": self.epsilon,
            "clip": self.clip,
            "parameters": dict(self.parameters),
        }


@dataclass(frozen=True)
class AttackKind:
    """An attack that can be asked for by name.

    Attributes:
        name: What the user types.
        title: What tables call it.
        norm: In which its perturbation is small.
        bounded: Whether it takes an epsilon; the others look for the smallest perturbation.
        parameters: Default settings.
        cost: From its settings to roughly how many gradients an image takes.
        clips: Whether to run it inside the box [0, 1], outside of it, or both.
    """

    name: str
    title: str
    norm: Norm
    bounded: bool
    parameters: Mapping[str, Setting]
    cost: Callable[[Mapping[str, Setting]], float]
    clips: tuple[bool, ...] = (True,)


ATTACKS: dict[str, AttackKind] = {
    kind.name: kind
    for kind in (
        AttackKind("fgsm", "FGSM", "linf", True, {}, cost=lambda _: 1.0),
        AttackKind(
            "pgd",
            "PGD",
            "linf",
            True,
            {"steps": 40, "rel_stepsize": 1 / 30, "random_start": True, "restarts": 1},
            cost=lambda p: float(p["steps"] * p.get("restarts", 1)),
        ),
        AttackKind(
            "deepfool",
            "DeepFool",
            "l2",
            False,
            {"steps": 50, "candidates": 10, "overshoot": 0.02},
            cost=lambda p: 5.0 * p["candidates"],
            clips=(True, False),
        ),
        AttackKind(
            "deepfool-fast",
            "DeepFool fast",
            "l2",
            False,
            {"steps": 50, "candidates": 10, "overshoot": 0.02, "slack": 2.0},
            cost=lambda p: 2.0 * p["candidates"],
            clips=(True, False),
        ),
        AttackKind(
            "cw",
            "C&W",
            "l2",
            False,
            {
                "steps": 1000,
                "binary_search_steps": 6,
                "stepsize": 0.1,
                "confidence": 0.0,
                "follow": False,
                "initial_const": 1.0,
            },
            cost=lambda p: 0.2 * p["steps"] * p["binary_search_steps"],
        ),
    )
}

DEFAULT_ATTACKS = ("fgsm", "pgd", "deepfool")
DEFAULT_EPSILONS = (0.1, 0.2, 0.3, 0.4)
"""The paper's strengths for MNIST (table 1), in pixel values of [0, 1]."""


def title_of(name: str) -> str:
    """Return what tables call an attack; its name if it is not one of :data:`ATTACKS`."""
    return ATTACKS[name].title if name in ATTACKS else name


def suite(
    names: Iterable[str] = DEFAULT_ATTACKS, epsilons: Sequence[float] = DEFAULT_EPSILONS
) -> tuple[AttackSpec, ...]:
    """Return the attacks to run: bounded ones at every epsilon, weakest first.

    Args:
        names: Names in :data:`ATTACKS`; one given twice counts once.
        epsilons: Strengths of the bounded attacks.

    Raises:
        UsageError: An unknown name, or none at all.
    """
    kinds = [named("attack", name, ATTACKS) for name in dict.fromkeys(map(str.lower, names))]
    if not kinds:
        raise UsageError("No attack was given.", f"Name one of: {', '.join(ATTACKS)}.")
    specs: list[AttackSpec] = []
    for kind in kinds:
        strengths: list[float | None] = [*sorted(epsilons)] if kind.bounded else [None]
        specs += [
            AttackSpec(kind.name, kind.norm, epsilon, clip, kind.parameters)
            for epsilon in strengths
            for clip in kind.clips
        ]
    return tuple(specs)


def parse_epsilons(text: str) -> tuple[float, ...]:
    """Read strengths such as ``"0.1,0.2"`` or ``"2/255, 4/255"``.

    Raises:
        UsageError: An item is no number, is not in (0, 1], or is there twice; names the item.
    """
    found: dict[str, float] = {}
    for item in text.split(","):
        value = _number(item.strip())
        if value is None:
            raise _bad_epsilon(item, "is not a number")
        if not 0.0 < value <= 1.0:
            raise _bad_epsilon(item, "is not above 0 and at most 1, the range of a pixel")
        if f"{value:g}" in found:
            raise _bad_epsilon(item, "is there twice")
        found[f"{value:g}"] = value
    return tuple(found.values())


def _number(text: str) -> float | None:
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return None if math.isnan(value) else value


def _bad_epsilon(item: str, why: str) -> UsageError:
    return UsageError(
        f"--epsilons: {item.strip()!r} {why}.",
        "Give numbers with commas between them, as in --epsilons 0.1,0.2 or 2/255,4/255.",
    )
