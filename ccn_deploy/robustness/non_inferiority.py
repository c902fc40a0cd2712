"""Proportions, and whether one is worse than another by more than is allowed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ccn_deploy.statistics import clopper_pearson, drop_upper_bound, samples_needed
from ccn_deploy.verdict import Verdict

ROUNDING = 1e-12
"""Slack of a comparison of two ratios that may be equal."""

Mask = NDArray[np.bool_]


def more_images(needed: int | None) -> str:
    """Return how many images would decide what these do not, for the end of a sentence."""
    return f"about {needed} images would, at this rate" if needed else "no number of images will"


@dataclass(frozen=True)
class Proportion:
    """A proportion with its exact 95 % interval.

    Attributes:
        count: Successes.
        n: Trials.
    """

    count: int
    n: int

    @classmethod
    def of(cls, successes: Mask) -> Proportion:
        """Count the true ones."""
        return cls(int(successes.sum()), len(successes))

    @property
    def value(self) -> float:
        """The proportion; 0 without trials."""
        return self.count / self.n if self.n else 0.0

    @property
    def ci95(self) -> tuple[float, float]:
        """Clopper and Pearson's two-sided interval."""
        return clopper_pearson(self.count, self.n)

    def document(self, name: str) -> dict[str, Any]:
        """Return this as JSON, the proportion by its name."""
        return {name: self.value, "ci95": list(self.ci95)}


@dataclass(frozen=True)
class PairedDifference:
    """By how much a second program is worse than a first, on the same images.

    Attributes:
        lost: Images that only the first gets right.
        gained: Images that only the second gets right.
        n: All images.
    """

    lost: int
    gained: int
    n: int

    @classmethod
    def of(cls, first: Mask, second: Mask) -> PairedDifference:
        """Compare the same images on both."""
        return PairedDifference(
            int((first & ~second).sum()), int((second & ~first).sum()), len(first)
        )

    @property
    def drop(self) -> float:
        """Accuracy of the first less that of the second."""
        return (self.lost - self.gained) / self.n if self.n else 0.0

    @property
    def upper95(self) -> float:
        """One-sided 95 % upper bound of the drop."""
        return drop_upper_bound(self.lost, self.gained, self.n)

    def difference(self) -> dict[str, Any]:
        """Return the comparison as JSON."""
        return {
            "lost": self.lost,
            "gained": self.gained,
            "drop": self.drop,
            "drop_upper95": self.upper95,
        }


@dataclass(frozen=True)
class NonInferiorityTest(PairedDifference):
    """Whether the runtime is worse than the reference, the first, by more than is allowed.

    Attributes:
        max_drop: What is allowed.
        invalid: Images for which an attack returned no legal image, on either side.
    """

    max_drop: float
    invalid: int = 0

    @classmethod
    def between(
        cls, reference: Mask, runtime: Mask, max_drop: float, invalid: int = 0
    ) -> NonInferiorityTest:
        """Compare the same images on both."""
        pair = PairedDifference.of(reference, runtime)
        return cls(pair.lost, pair.gained, pair.n, max_drop, invalid)

    @property
    def verdict(self) -> Verdict:
        """Fail if the drop itself is too large, pass only if its upper bound is small enough."""
        if self.invalid:
            return Verdict.INCONCLUSIVE
        if self.drop > self.max_drop + ROUNDING:
            return Verdict.FAIL
        if self.upper95 <= self.max_drop + ROUNDING:
            return Verdict.PASS
        return Verdict.INCONCLUSIVE

    @property
    def reason(self) -> str:
        """One sentence for a gate that did not pass; empty for one that did."""
        if self.verdict is Verdict.PASS:
            return ""
        if self.invalid:
            return f"the attack returned {self.invalid} images that are no legal ones"
        if self.verdict is Verdict.FAIL:
            return (
                f"{self.lost} of {self.n} images lost and {self.gained} gained, a drop of "
                f"{100 * self.drop:.2f} points; {100 * self.max_drop:g} are allowed"
            )
        more = more_images(self.needed())
        return (
            f"{self.n} images ({self.lost} lost, {self.gained} gained) bound the drop only by "
            f"{100 * self.upper95:.2f} points, not by {100 * self.max_drop:g}; {more}"
        )

    def needed(self) -> int | None:
        """Return how many images would pass if they went on like these; None if none would."""
        if self.max_drop <= max(self.drop, 0.0):
            return None
        if self.lost == 0 and self.gained == 0:
            return samples_needed(self.max_drop)
        for factor in (1.1**k for k in range(1, 73)):  # to a thousand times as many
            n = math.ceil(self.n * factor)
            lost, gained = round(self.lost * factor), round(self.gained * factor)
            if drop_upper_bound(lost, gained, n) <= self.max_drop:
                return n
        return None

    def document(self) -> dict[str, Any]:
        """Return this as JSON."""
        return {
            "verdict": self.verdict.value,
            "reason": self.reason,
            **self.difference(),
            "max_drop": self.max_drop,
        }
