"""What the numbers of an evaluation give away about how far to trust them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Literal

import msgspec

from ccn_deploy.records import Record, Text
from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Measurement
from ccn_deploy.robustness.rows import FixedEpsilonResult, MinimizationResult

Code = Literal[
    "black-box-below-white-box",
    "bounded-above-minimum-norm",
    "chance-accuracy",
    "clean-labels-differ",
    "constant-background-gradients",
    "duplicates-in-data",
    "exploding-gradients",
    "fgsm-above-apgd",
    "gain",
    "gradients-disagree",
    "gradients-of-two-kinds",
    "large-epsilon-not-chance",
    "larger-epsilon-weaker",
    "more-steps-weaker",
    "no-legal-image",
    "nothing-right",
    "one-attack-only",
    "planted-not-found",
    "random-answers",
    "reference-accuracy",
    "reference-itself",
    "saturated-logits",
    "training-data-overlap",
    "transfer-below-native",
    "zero-gradients",
]


class SanityFinding(Record, frozen=True):
    """Something that a reader of the numbers should know.

    Attributes:
        code: What kind of thing it is.
        undermines: Whether no pass may rest on the numbers.
        sentence: For people; names the figures.
        figures: What the sentence rests on, by name.
    """

    code: Code
    undermines: bool
    sentence: Text
    figures: dict[str, float | int | str] = msgspec.field(default_factory=dict)

    @property
    def word(self) -> str:
        """How grave it is: a doubt stands in the way of a pass, a note does not."""
        return "doubt" if self.undermines else "note"


FLATTERY = 0.1
"""FGSM accuracy this far above PGD's at the same epsilon is worth a finding."""


def sanity_findings(
    measurement: Measurement,
    clean: FixedEpsilonResult,
    bounded: Sequence[FixedEpsilonResult],
    minimal: Sequence[MinimizationResult],
    max_drop: float,
) -> list[SanityFinding]:
    """Return what the numbers themselves give away.

    Args:
        measurement: What was judged.
        clean: Its row without an attack.
        bounded: Its rows of attacks with an epsilon.
        minimal: Its rows of attacks without.
        max_drop: By how much the runtime's accuracy may be below the reference's.
    """
    found: list[SanityFinding] = []
    if measurement.target == str(REFERENCE):
        found.append(
            SanityFinding(
                code="reference-itself",
                undermines=False,
                sentence="The runtime is the reference itself: nothing is compared.",
            )
        )
    if clean.runtime.count == 0:
        found.append(
            SanityFinding(
                code="nothing-right",
                undermines=True,
                sentence="Every image is wrong before any attack: no robustness was measured.",
            )
        )
    if clean.flips > 0.01 * clean.runtime.n:
        found.append(
            SanityFinding(
                code="clean-labels-differ",
                undermines=False,
                sentence=f"Runtime and reference give {clean.flips} clean images different "
                "verdicts: gradients of the reference may mislead an attack on the runtime. See "
                "`verify-parity`.",
                figures={"images": clean.flips, "n": clean.runtime.n},
            )
        )
    at = {(row.name, row.epsilon): row.runtime.value for row in bounded}
    for (name, epsilon), accuracy in at.items():
        other = at.get(("pgd", epsilon))
        if name != "fgsm" or other is None:
            continue
        if accuracy - other > FLATTERY:
            found.append(
                SanityFinding(
                    code="fgsm-above-apgd",
                    undermines=False,
                    sentence=f"FGSM flatters this model at epsilon {epsilon:g}: "
                    f"{100 * accuracy:.1f} % against {100 * other:.1f} % under PGD. Quote PGD.",
                    figures={"epsilon": epsilon, "fgsm": accuracy, "strongest": other},
                )
            )
        elif other - accuracy > FLATTERY / 10:
            found.append(
                SanityFinding(
                    code="more-steps-weaker",
                    undermines=True,
                    sentence=f"PGD found less than FGSM at epsilon {epsilon:g}: "
                    f"{100 * other:.1f} % against {100 * accuracy:.1f} %. Its gradients mislead; "
                    "neither number is a bound.",
                    figures={"epsilon": epsilon, "fgsm": accuracy, "pgd": other},
                )
            )
    for name in dict.fromkeys(row.name for row in bounded):
        rows = sorted((row for row in bounded if row.name == name), key=lambda row: row.epsilon)
        for weak, strong in itertools.pairwise(rows):
            if strong.runtime.value > weak.runtime.value + FLATTERY / 10:
                found.append(
                    SanityFinding(
                        code="larger-epsilon-weaker",
                        undermines=True,
                        sentence=f"{strong.title} at epsilon {strong.epsilon:g} leaves more images "
                        f"right than at {weak.epsilon:g}: the attack is not finding what is there.",
                        figures={
                            "attack": name,
                            "smaller": weak.epsilon,
                            "larger": strong.epsilon,
                            "at_smaller": weak.runtime.value,
                            "at_larger": strong.runtime.value,
                        },
                    )
                )
    strengths = {row.name for row in bounded}
    if strengths and "pgd" not in strengths:
        found.append(
            SanityFinding(
                code="one-attack-only",
                undermines=False,
                sentence="No PGD was run: FGSM alone flatters networks like these.",
            )
        )
    return found
