"""Attacks as data: which, how strong, with which settings. Imports no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import MappingProxyType
from typing import Any, Literal

from ccn_deploy.errors import UsageError, named

Norm = Literal["linf", "l2"]
Setting = int | float | bool | str
Knowledge = Literal["gradients", "scores", "labels"]
"""What an attack asks of a network besides its forward pass, from most to least."""


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
        part: Only the first so many images of the evaluation are attacked; None for all of them.
        stages: Attacks that make up this one, in order, each on the images that still hold.
            Without stages it is one attack.
    """

    name: str
    norm: Norm
    epsilon: float | None = None
    clip: bool = True
    parameters: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    part: int | None = None
    stages: tuple[AttackSpec, ...] = ()

    @property
    def title(self) -> str:
        """What tables call it, without its strength; the name of an attack that is not ours."""
        return title_of(self.name)

    @property
    def cost(self) -> float:
        """Roughly how many gradients an image takes, to tell the time left."""
        if self.stages:
            return sum(stage.cost for stage in self.stages)
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
            "part": self.part,
            "stages": [stage.document() for stage in self.stages],
        }


@dataclass(frozen=True)
class Stage:
    """One stage of an attack that is made up of others.

    Attributes:
        name: A name in :data:`ATTACKS`, or :data:`TRANSFER`.
        settings: What differs from the attack's default parameters.
        part: As in :class:`AttackSpec`.
    """

    name: str
    settings: Mapping[str, Setting] = field(default_factory=dict, hash=False)
    part: int | None = None


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
        knowledge: What it asks of the network.
        stages: What it is made up of, if it is not one attack.
    """

    name: str
    title: str
    norm: Norm
    bounded: bool
    parameters: Mapping[str, Setting]
    cost: Callable[[Mapping[str, Any]], float]
    clips: tuple[bool, ...] = (True,)
    knowledge: Knowledge = "gradients"
    stages: tuple[Stage, ...] = ()


_FORWARD = 0.3
"""What a forward pass costs, in gradients."""

TRANSFER = "transfer"
"""The name of the stage that takes the images of the reference's own audit and makes none."""


def _pgd(name: str, title: str, norm: Norm, targets: int = 0) -> AttackKind:
    parameters: dict[str, Setting] = {
        "steps": 40,
        "rel_stepsize": 1.0,
        "decay": True,
        "random_start": True,
        "restarts": 1,
    }
    if targets:
        parameters["targets"] = targets  # which share the steps
    return AttackKind(name, title, norm, True, parameters, lambda p: p["steps"] * p["restarts"])


def _apgd(name: str, title: str, norm: Norm, targets: int = 0) -> AttackKind:
    parameters: dict[str, Setting] = {"steps": 100, "restarts": 1}
    if targets:
        parameters |= {"targets": targets, "pursuits": 0}
    return AttackKind(
        name,
        title,
        norm,
        True,
        parameters,
        lambda p: p["steps"] * p["restarts"] * p.get("targets", 1),
    )


def _square(name: str, title: str, norm: Norm) -> AttackKind:
    parameters: dict[str, Setting] = {"queries": 1000, "p_init": 0.8, "restarts": 1}
    return AttackKind(
        name,
        title,
        norm,
        True,
        parameters,
        lambda p: _FORWARD * p["queries"] * p["restarts"],
        knowledge="scores",
    )


def _fmn(name: str, title: str, norm: Norm, stepsize: float) -> AttackKind:
    parameters: dict[str, Setting] = {"steps": 100, "stepsize": stepsize, "gamma": 0.05}
    return AttackKind(name, title, norm, False, parameters, lambda p: float(p["steps"]))


def _audit(name: str, title: str, norm: Norm, *, minimum: str, ending: str = "") -> AttackKind:
    stages = (
        Stage(f"apgd{ending}", {"steps": 100}),
        Stage(f"apgd-t{ending}", {"steps": 40, "targets": 4, "pursuits": 5}),
        Stage(minimum),
        Stage(f"square{ending}", part=100),
        Stage("hopskipjump", part=20),
        Stage(TRANSFER),
    )
    return AttackKind(name, title, norm, True, {}, cost=lambda _: 1.0, stages=stages)


ATTACKS: dict[str, AttackKind] = {
    kind.name: kind
    for kind in (
        AttackKind("fgsm", "FGSM", "linf", True, {}, cost=lambda _: 1.0),
        _pgd("pgd", "PGD", "linf"),
        _pgd("pgd-margin", "PGD margin", "linf"),
        _pgd("pgd-targeted", "PGD targeted", "linf", targets=4),
        _pgd("pgd-l2", "PGD L2", "l2"),
        _apgd("apgd", "APGD", "linf"),
        _apgd("apgd-dlr", "APGD-DLR", "linf"),
        _apgd("apgd-t", "APGD-T", "linf", targets=9),
        _apgd("apgd-l2", "APGD L2", "l2"),
        _apgd("apgd-dlr-l2", "APGD-DLR L2", "l2"),
        _apgd("apgd-t-l2", "APGD-T L2", "l2", targets=9),
        _square("square", "Square", "linf"),
        _square("square-l2", "Square L2", "l2"),
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
        _fmn("fmn", "FMN", "l2", stepsize=3.0),
        _fmn("fmn-linf", "FMN Linf", "linf", stepsize=10.0),
        AttackKind(
            "hopskipjump",
            "HopSkipJump",
            "l2",
            False,
            {"queries": 2000, "gradient_queries": 100},
            cost=lambda p: _FORWARD * p["queries"],
            knowledge="labels",
        ),
        _audit("audit", "Audit", "linf", minimum="fmn-linf"),
        _audit("audit-l2", "Audit L2", "l2", minimum="fmn", ending="-l2"),
    )
}

ALIASES = {"apgd-ce": "apgd"}
"""Other names that people know an attack by."""

DEFAULT_ATTACKS = ("fgsm", "pgd", "deepfool")
DEFAULT_EPSILONS = (0.1, 0.2, 0.3, 0.4)
"""The paper's strengths for MNIST (table 1), in pixel values of [0, 1]."""

DEFAULT_L2_EPSILONS = (0.5, 1.0, 1.5, 2.0)
"""Strengths in L2, in the same pixel values: half of the way to C&W's mean distance and beyond."""


def title_of(name: str) -> str:
    """Return what tables call an attack; its name if it is not one of :data:`ATTACKS`."""
    return ATTACKS[name].title if name in ATTACKS else name


def kinds_of(names: Iterable[str]) -> tuple[AttackKind, ...]:
    """Return what names stand for; one given twice counts once.

    Args:
        names: Names in :data:`ATTACKS` or :data:`ALIASES`, in any case.

    Raises:
        UsageError: An unknown name, or none at all.
    """
    lowered = [name.lower() for name in names]
    known = dict.fromkeys(ALIASES.get(name, name) for name in lowered)
    kinds = tuple(named("attack", name, ATTACKS) for name in known)
    if not kinds:
        raise UsageError("No attack was given.", f"Name one of: {', '.join(ATTACKS)}.")
    return kinds


def suite(
    names: Iterable[str] = DEFAULT_ATTACKS,
    epsilons: Sequence[float] = DEFAULT_EPSILONS,
    *,
    l2_epsilons: Sequence[float] = DEFAULT_L2_EPSILONS,
    settings: Mapping[str, Mapping[str, Setting]] = MappingProxyType({}),
) -> tuple[AttackSpec, ...]:
    """Return the attacks to run: bounded ones at every epsilon, weakest first.

    Args:
        names: As for :func:`kinds_of`.
        epsilons: Strengths of the attacks bounded in Linf.
        l2_epsilons: Strengths of those bounded in L2.
        settings: By attack, what differs from its default parameters.

    Raises:
        UsageError: An unknown name, none at all, or a setting that its attack does not have.
    """
    specs: list[AttackSpec] = []
    for kind in kinds_of(names):
        parameters = _parameters(kind, settings.get(kind.name, {}))
        bounds = epsilons if kind.norm == "linf" else l2_epsilons
        strengths: list[float | None] = [*sorted(bounds)] if kind.bounded else [None]
        specs += [
            AttackSpec(
                kind.name,
                kind.norm,
                epsilon,
                clip,
                parameters,
                stages=tuple(_stage(stage, kind.norm, epsilon) for stage in kind.stages),
            )
            for epsilon in strengths
            for clip in kind.clips
        ]
    return tuple(specs)


def _stage(stage: Stage, norm: Norm, epsilon: float | None) -> AttackSpec:
    """Return a stage of an attack bounded by ``epsilon`` in ``norm``.

    One that looks for the smallest perturbation has no bound of its own: whether what it found is
    near enough is for the whole to say.
    """
    kind = ATTACKS.get(stage.name)
    if kind is None:
        return AttackSpec(stage.name, norm, epsilon, part=stage.part)
    bound = epsilon if kind.bounded else None
    parameters = _parameters(kind, stage.settings)
    return AttackSpec(kind.name, kind.norm, bound, True, parameters, stage.part)


def _parameters(kind: AttackKind, settings: Mapping[str, Setting]) -> Mapping[str, Setting]:
    for name in settings:
        if name not in kind.parameters:
            raise UsageError(
                f"{kind.title} has no setting {name!r}.",
                f"It has: {', '.join(kind.parameters) or 'none'}.",
            )
    return {**kind.parameters, **settings}


def settings_of(
    names: Iterable[str],
    *,
    steps: int | None = None,
    step_size: float | None = None,
    restarts: int | None = None,
) -> dict[str, dict[str, Setting]]:
    """Return the ``settings`` of :func:`suite` that options for several attacks stand for.

    An option changes every attack among ``names`` that takes it, of the kinds of PGD and APGD.

    Args:
        names: As for :func:`kinds_of`.
        steps: At most so many steps.
        step_size: Length of a step, relative to epsilon; it then stays that long.
        restarts: How often to start.

    Raises:
        UsageError: An option that means nothing, or that none of the attacks takes.
    """
    options: dict[str, dict[str, Setting]] = {}
    for option, name, value, least in (
        ("--steps", "steps", steps, 1),
        ("--step-size", "rel_stepsize", step_size, 0.0),
        ("--restarts", "restarts", restarts, 1),
    ):
        if value is None:
            continue
        if not (least <= value < math.inf and value > 0):
            raise UsageError(f"{option}: {value} is not above 0.", f"Give {option} a number above.")
        options[option] = {name: value, **({"decay": False} if name == "rel_stepsize" else {})}
    found: dict[str, dict[str, Setting]] = {}
    kinds = [kind for kind in kinds_of(names) if kind.name.startswith(("pgd", "apgd"))]
    for option, changes in options.items():
        takers = [kind.name for kind in kinds if changes.keys() <= kind.parameters.keys()]
        if not takers:
            raise UsageError(
                f"{option}: none of the attacks takes it.",
                "Name one that does, such as --attack pgd, or leave the option out.",
            )
        for taker in takers:
            found.setdefault(taker, {}).update(changes)
    return found


def parse_epsilons(text: str, norm: Norm = "linf") -> tuple[float, ...]:
    """Read strengths such as ``"0.1,0.2"`` or ``"2/255, 4/255"``.

    Args:
        text: Numbers with commas between them.
        norm: Of the perturbations; in Linf they are at most 1, the range of a pixel.

    Raises:
        UsageError: An item is no number, is not in range, or is there twice; names the item.
    """
    found: dict[str, float] = {}
    for item in text.split(","):
        value = number(item.strip())
        if value is None:
            raise _bad_epsilon(item, "is not a number", norm)
        if norm == "linf" and not 0.0 < value <= 1.0:
            raise _bad_epsilon(item, "is not above 0 and at most 1, the range of a pixel", norm)
        if not 0.0 < value < math.inf:
            raise _bad_epsilon(item, "is not above 0 and finite", norm)
        if f"{value:g}" in found:
            raise _bad_epsilon(item, "is there twice", norm)
        found[f"{value:g}"] = value
    return tuple(found.values())


def number(text: str) -> float | None:
    """Read a number or a fraction, ``"8/255"``; None for anything else, and for NaN."""
    try:
        value = float(Fraction(text)) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError, OverflowError):
        return None
    return None if math.isnan(value) else value


def _bad_epsilon(item: str, why: str, norm: Norm) -> UsageError:
    option, examples = {
        "linf": ("--epsilons", "--epsilons 0.1,0.2 or 2/255,4/255"),
        "l2": ("--epsilons-l2", "--epsilons-l2 0.5,1,2"),
    }[norm]
    return UsageError(
        f"{option}: {item.strip()!r} {why}.",
        f"Give numbers with commas between them, as in {examples}.",
    )
