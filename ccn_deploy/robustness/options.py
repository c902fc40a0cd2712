"""What a user asks to be attacked with: the options that commands and claims share."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, cast

from ccn_deploy.attacks.spec import (
    DEFAULT_ATTACKS,
    DEFAULT_EPSILONS,
    DEFAULT_L2_EPSILONS,
    AttackSpec,
    Setting,
    kinds_of,
    parse_epsilons,
    settings_of,
    suite,
)
from ccn_deploy.bundle import Bundle
from ccn_deploy.errors import UsageError
from ccn_deploy.robustness.collect import Measurement, RobustnessRequest
from ccn_deploy.robustness.recheck import Recheck, default_count, recheck
from ccn_deploy.robustness.thresholds import Threshold


@dataclass(frozen=True)
class AttackOptions:
    """Attacks, strengths and settings as they were typed; None is what was not given.

    Attributes:
        attacks: Names.
        epsilons: Strengths in Linf, with commas between them.
        epsilons_l2: Strengths in L2, likewise.
        steps: Of PGD and APGD.
        step_size: Of PGD, relative to epsilon.
        restarts: Of PGD and APGD.
    """

    attacks: Sequence[str] = DEFAULT_ATTACKS
    epsilons: str | None = None
    epsilons_l2: str | None = None
    steps: int | None = None
    step_size: float | None = None
    restarts: int | None = None

    @property
    def linf(self) -> tuple[float, ...]:
        """Strengths in Linf.

        Raises:
            UsageError: They are none.
        """
        return DEFAULT_EPSILONS if self.epsilons is None else parse_epsilons(self.epsilons)

    def suite(self, thresholds: Sequence[Threshold] = ()) -> tuple[AttackSpec, ...]:
        """Return the attacks to run, with what thresholds need beside what was named.

        Raises:
            UsageError: An option means nothing, or no attack takes it.
        """
        wanted = [t for t in thresholds if t.attack is not None]
        names = [*self.attacks, *(str(t.attack) for t in wanted)]
        kinds = kinds_of(names)
        if self.epsilons is not None and not any(kind.norm == "linf" for kind in kinds):
            raise _unused("--epsilons", "of attacks in Linf", "pgd")
        if self.epsilons_l2 is not None and not any(k.bounded and k.norm == "l2" for k in kinds):
            raise _unused("--epsilons-l2", "of attacks that are bounded in L2", "pgd-l2")
        settings = self._settings(names)
        found = dict.fromkeys(self._named(settings))
        for threshold in wanted:
            at = [threshold.strength]
            more = suite([str(threshold.attack)], at, l2_epsilons=at, settings=settings)
            found |= dict.fromkeys(spec for spec in more if spec.clip)
        order = {kind.name: at for at, kind in enumerate(kinds)}
        return tuple(sorted(found, key=lambda s: (order[s.name], s.epsilon or 0.0, not s.clip)))

    def added(self, thresholds: Sequence[Threshold]) -> tuple[AttackSpec, ...]:
        """Return what :meth:`suite` runs only because a threshold asks for it."""
        every = self.suite(thresholds)
        named = self._named(self._settings([spec.name for spec in every]))
        return tuple(spec for spec in every if spec not in named)

    def _named(self, settings: Mapping[str, Mapping[str, Setting]]) -> tuple[AttackSpec, ...]:
        l2: Sequence[float] = DEFAULT_L2_EPSILONS
        if self.epsilons_l2 is not None:
            l2 = parse_epsilons(self.epsilons_l2, "l2")
        return suite(self.attacks, self.linf, l2_epsilons=l2, settings=settings)

    def _settings(self, names: Sequence[str]) -> Mapping[str, Mapping[str, Setting]]:
        return settings_of(
            names, steps=self.steps, step_size=self.step_size, restarts=self.restarts
        )


def _unused(option: str, what: str, example: str) -> UsageError:
    return UsageError(
        f"{option}: none of the attacks takes it; it gives the strengths {what}.",
        f"Name such an attack, as in --attack {example}, or leave the option out.",
    )


def parse_recheck(text: str | None, option: str = "--recheck") -> int | Literal["all"] | None:
    """Read how many images to ask again about, a number or ``"all"``; None is as it is.

    Raises:
        UsageError: It is neither.
    """
    if text is None or text == "all":
        return cast('Literal["all"] | None', text)
    try:
        count = int(text)
    except ValueError:
        count = -1
    if count < 0:
        raise UsageError(
            f"{option} {text} is no number of images.", f"Give a number, or {option} all."
        )
    return count


def rechecked(
    bundle: Bundle,
    request: RobustnessRequest,
    measurement: Measurement,
    asked: int | Literal["all"] | None,
) -> Recheck | None:
    """Ask again about evidence that was read, of a tenth of the images if nothing is said.

    Returns:
        What was found; None if nothing was asked.

    Raises:
        IntegrityError: The evidence says what is not so.
    """
    count = default_count(measurement) if asked is None else asked
    return recheck(bundle, request, measurement, count) if count else None
