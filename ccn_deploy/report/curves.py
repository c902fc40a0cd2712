"""The curves of a judgement: accuracy against the size of the perturbation."""

from __future__ import annotations

from collections.abc import Mapping

from ccn_deploy.report.figures import Curve, Point
from ccn_deploy.robustness import RobustnessResult
from ccn_deploy.robustness.non_inferiority import Proportion
from ccn_deploy.robustness.worst_case import worst_case
from ccn_deploy.tables import NORMS


def curves(result: RobustnessResult) -> list[Curve]:
    """Return a curve for each attack, against epsilon or else d, from the clean accuracy on."""
    clean = result.clean
    found = []
    for title in dict.fromkeys(row.title for row in result.bounded):
        rows = [row for row in result.bounded if row.title == title]
        found.append(
            Curve(
                title,
                f"ε, {NORMS[str(rows[0].norm)]} of the perturbation",
                reference=_points(clean.reference, {r.epsilon: r.reference for r in rows}),
                runtime=_points(clean.runtime, {r.epsilon: r.runtime for r in rows}),
            )
        )
    for attack in result.minimal:
        found.append(
            Curve(
                attack.full_title,
                f"d, {NORMS[attack.norm]}"
                + (" over that of the image" if attack.norm == "l2" else " of the perturbation"),
                reference=_points(clean.reference, attack.reference.accuracy_at),
                runtime=_points(clean.runtime, attack.runtime.accuracy_at),
            )
        )
    return found


def worst_case_curve(result: RobustnessResult) -> Curve | None:
    """Return what is left of the runtime at each strength if every attack counts.

    The reference has no such curve here: it is what is deployed that an attacker meets. None where
    no attack has a strength.
    """
    norm, left = worst_case(result)
    if not left:
        return None
    axis = f"ε, {NORMS[norm]} of the perturbation"
    return Curve("Worst case over all attacks", axis, (), _points(result.clean.runtime, left))


def _points(clean: Proportion, at: Mapping[float, Proportion]) -> list[Point]:
    shares = {0.0: clean, **dict(sorted(at.items()))}
    return [Point(size, share.value, *share.ci95) for size, share in shares.items()]
