"""Absolute thresholds: what accuracy must be left, whatever the reference leaves.

A bound on the drop compares a deployed program with its reference: where an attack leaves nothing
of either, nothing was lost. Whether what is left is enough is another question, and the answer has
to be given before the numbers are seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from ccn_deploy.attacks.spec import AttackSpec, number, suite, title_of
from ccn_deploy.errors import UsageError
from ccn_deploy.robustness.non_inferiority import ROUNDING, Proportion, more_images
from ccn_deploy.statistics import share_lower_bound, trials_needed
from ccn_deploy.verdict import Verdict

SLIP = 0.5
"""An allowed drop of this much or more is surely one that was meant in percent."""


@dataclass(frozen=True)
class Threshold:
    """The share of images that must be right, and stay right.

    Attributes:
        share: The least, above 0 and below 1.
        attack: Name of the attack; None for accuracy without one.
        strength: Its epsilon, or the distance d within which an attack that looks for the
            smallest perturbation must not succeed; 0 without an attack.
    """

    share: float
    attack: str | None = None
    strength: float = 0.0

    @property
    def label(self) -> str:
        """For test ids, such as ``"apgd@0.1>=0.55"``."""
        where = "accuracy" if self.attack is None else f"{self.attack}@{self.strength:g}"
        return f"{where}>={self.share:g}"

    @property
    def spec(self) -> AttackSpec | None:
        """The attack that it takes, with its default settings; None without one."""
        return None if self.attack is None else _spec(self.attack, self.strength)

    @property
    def where(self) -> str:
        """For sentences, such as ``"APGD at epsilon 0.1"``."""
        if (spec := self.spec) is None:
            return "no attack"
        symbol = "d =" if spec.epsilon is None else "epsilon"
        return f"{title_of(spec.name)} at {symbol} {self.strength:g}"


@dataclass(frozen=True)
class ThresholdTest:
    """Whether a runtime is shown to reach a threshold.

    Attributes:
        threshold: What it must reach.
        reached: Proportion of images that are right and stay right.
        invalid: Images of which the attack showed nothing; they are not counted as right.
    """

    threshold: Threshold
    reached: Proportion
    invalid: int = 0

    @property
    def lower95(self) -> float:
        """One-sided 95 % lower bound of the proportion (Clopper and Pearson)."""
        return share_lower_bound(self.reached.count, self.reached.n)

    @property
    def verdict(self) -> Verdict:
        """Fail if the proportion itself is too small, pass only if its lower bound is not."""
        count, n, least = self.reached.count, self.reached.n, self.threshold.share - ROUNDING
        if count + self.invalid < least * n:
            return Verdict.FAIL
        if self.invalid or self.lower95 < least:
            return Verdict.INCONCLUSIVE
        return Verdict.PASS

    @property
    def needed(self) -> int | None:
        """How many images would pass if they went on like these; None if none would."""
        if self.reached.n == 0:
            return None
        return trials_needed(self.reached.count, self.reached.n, self.threshold.share)

    @property
    def reason(self) -> str:
        """One sentence for a threshold that is not shown to be reached; else empty."""
        if self.verdict is Verdict.PASS:
            return ""
        count, n = self.reached.count, self.reached.n
        required = f"{100 * self.threshold.share:g} % are required"
        if self.verdict is Verdict.FAIL:
            return f"{count} of {n} images are right, {100 * self.reached.value:.2f} %; {required}"
        if self.invalid:
            return f"the attack returned {self.invalid} images that are no legal ones"
        return (
            f"{count} of {n} images are right, which shows only {100 * self.lower95:.2f} %; "
            f"{required}; {more_images(self.needed)}"
        )

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "attack": self.threshold.attack,
            "strength": self.threshold.strength,
            "share": self.threshold.share,
            "verdict": self.verdict.value,
            "reason": self.reason,
            **self.reached.document("robust_accuracy"),
            "lower95": self.lower95,
            "needed": None if self.verdict is not Verdict.INCONCLUSIVE else self.needed,
        }


def thresholds_of(
    min_robust: Iterable[str] = (), min_accuracy: str | None = None, prefix: str = "--"
) -> tuple[Threshold, ...]:
    """Read the two options that give thresholds, ``min-robust`` and ``min-accuracy``.

    Raises:
        UsageError: One of them is none.
    """
    clean = () if min_accuracy is None else (parse_share(min_accuracy, f"{prefix}min-accuracy"),)
    return (*map(Threshold, clean), *parse_min_robust(min_robust, f"{prefix}min-robust"))


def parse_min_robust(texts: Iterable[str], option: str = "--min-robust") -> tuple[Threshold, ...]:
    """Read thresholds such as ``"apgd@0.1=0.55"``, ``"apgd@8/255=55%"`` or ``"cw@0.2=0.4"``.

    Raises:
        UsageError: One is none: no such attack, a strength that it cannot have, no share, or the
            same attack and strength twice.
    """
    found: dict[tuple[str, float], Threshold] = {}
    for text in texts:
        what, equals, share = text.partition("=")
        name, at, strength = what.partition("@")
        hint = f"Write ATTACK@STRENGTH=SHARE, as in {option} apgd@0.1=0.55 or apgd@8/255=55%."
        if not equals or not at:
            raise UsageError(f"{option} {text!r} is no threshold.", hint)
        size = _number(strength)
        if size is None or size <= 0.0:
            raise UsageError(f"{option} {text!r}: {strength!r} is no number above 0.", hint)
        spec = _spec(name.strip(), size)
        if spec.norm == "linf" and size > 1.0:
            raise UsageError(
                f"{option} {text!r}: {strength!r} is above 1, the range of a pixel.", hint
            )
        threshold = Threshold(parse_share(share, f"{option} {what}="), spec.name, size)
        if (spec.name, size) in found:
            raise UsageError(f"{option}: there are two thresholds for {what!r}.", "Give one.")
        found[spec.name, size] = threshold
    return tuple(found.values())


def parse_share(text: str, option: str) -> float:
    """Read a share of images that is required, ``"0.55"`` or ``"55%"``.

    Raises:
        UsageError: It is not above 0 and below 1.
    """
    share = _share(text)
    if share is None:
        raise UsageError(f"{option}{_gap(option)}{text!r} is no share.", _write(option, 55))
    if share > 1.0:
        raise UsageError(
            f"{option}{_gap(option)}{text} is more than all images.",
            _write(option, share) if share < 100 else "Give a share above 0 and below 1.",
        )
    if not 0.0 < share < 1.0:
        raise UsageError(
            f"{option}{_gap(option)}{text} can{'not fail' if share <= 0 else 'never be shown'}.",
            "Give a share above 0 and below 1, such as 55% or 0.55.",
        )
    return share


def parse_max_drop(text: str, option: str = "--max-drop") -> float:
    """Read an allowed drop of accuracy, ``"1%"`` or ``"0.01"``.

    Raises:
        UsageError: It is none that could be shown, or so much that percent must have been meant.
    """
    share = _share(text)
    if share is None or share <= 0.0:
        raise UsageError(
            f"{option} {text} is no share of images that could be shown.",
            f"For one point of accuracy write {option} 1% or {option} 0.01.",
        )
    if share >= SLIP:
        meant = "" if text.strip().endswith("%") or share >= 100 * SLIP else _write(option, share)
        raise UsageError(
            f"{option} {text} would allow a drop of {100 * share:g} points.",
            meant or f"Allow less than {100 * SLIP:g}, such as {option} 1% or {option} 0.01.",
        )
    return share


def _write(option: str, points: float) -> str:
    gap = _gap(option)
    return f"For {points:g} % write {option}{gap}{points:g}% or {option}{gap}{points / 100:g}."


def _gap(option: str) -> str:
    return "" if option.endswith("=") else " "


def _share(text: str) -> float | None:
    given = text.strip()
    value = _number(given.removesuffix("%"))
    return None if value is None else value / 100 if given.endswith("%") else value


def _number(text: str) -> float | None:
    value = number(text)
    return value if value is not None and math.isfinite(value) else None


def _spec(name: str, strength: float) -> AttackSpec:
    return suite([name], [strength], l2_epsilons=[strength])[0]
