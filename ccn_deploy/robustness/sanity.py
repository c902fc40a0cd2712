"""What the numbers of an evaluation give away about how far to trust them."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ccn_deploy.robustness.attack_session import REFERENCE
from ccn_deploy.robustness.collect import Measurement
from ccn_deploy.robustness.rows import FixedEpsilonResult

FLATTERY = 0.1
"""FGSM accuracy this far above PGD's at the same epsilon is worth a warning."""


def sanity_findings(
    measurement: Measurement, clean: FixedEpsilonResult, bounded: Sequence[FixedEpsilonResult]
) -> list[str]:
    """Return what the numbers themselves give away, one sentence each.

    Args:
        measurement: What was judged.
        clean: Its row without an attack.
        bounded: Its rows of attacks with an epsilon.
    """
    found: list[str] = []
    if measurement.target == str(REFERENCE):
        found.append("The runtime is the reference itself: nothing is compared.")
    if clean.runtime.count == 0:
        found.append("Every image is wrong before any attack: no robustness was measured.")
    if clean.flips > 0.01 * clean.runtime.n:
        found.append(
            f"Runtime and reference give {clean.flips} clean images different verdicts: gradients "
            "of the reference may mislead an attack on the runtime. See `verify-parity`."
        )
    at = {(row.name, row.epsilon): row.runtime.value for row in bounded}
    for (name, epsilon), accuracy in at.items():
        other = at.get(("pgd", epsilon))
        if name != "fgsm" or other is None:
            continue
        if accuracy - other > FLATTERY:
            found.append(
                f"FGSM flatters this model at epsilon {epsilon:g}: {100 * accuracy:.1f} % "
                f"against {100 * other:.1f} % under PGD. Quote PGD."
            )
        elif other - accuracy > FLATTERY / 10:
            found.append(
                f"PGD found less than FGSM at epsilon {epsilon:g}: {100 * other:.1f} % against "
                f"{100 * accuracy:.1f} %. Its gradients mislead; neither number is a bound."
            )
    for name in dict.fromkeys(row.name for row in bounded):
        rows = sorted((row for row in bounded if row.name == name), key=lambda row: row.epsilon)
        for weak, strong in itertools.pairwise(rows):
            if strong.runtime.value > weak.runtime.value + FLATTERY / 10:
                found.append(
                    f"{strong.title} at epsilon {strong.epsilon:g} leaves more images right than "
                    f"at {weak.epsilon:g}: the attack is not finding what is there."
                )
    strengths = {row.name for row in bounded}
    if strengths and "pgd" not in strengths:
        found.append("No PGD was run: FGSM alone flatters networks like these.")
    return found
