"""The worst case of an evaluation: what is left when every attack is counted at once."""

from __future__ import annotations

import numpy as np

from ccn_deploy.attacks.spec import AttackSpec, Norm
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.non_inferiority import Mask, Proportion
from ccn_deploy.robustness.outcomes import right
from ccn_deploy.robustness.result import RobustnessResult

_ROUNDING = 1e-6
"""By how much, relatively, a perturbation may be longer than its bound for rounding's sake."""


def worst_case(result: RobustnessResult) -> tuple[Norm, dict[float, Proportion]]:
    """Return the share of images that no attack moved within each strength, on the target.

    An image counts as lost at a strength if any attack, of whatever norm and aim, found a legal
    image for it that is no farther away than that; or if an attack that should have looked there
    returned none that is legal.

    Returns:
        The norm in which strengths are measured, Linf if any attack is bounded in it, and the
        shares by strength, the smallest first. No strengths where no attack has one.
    """
    pairs = [pair for pair in result.measurement.pairs if pair.spec.clip]
    bounded = [pair.spec for pair in pairs if pair.spec.epsilon is not None]
    norm: Norm = "linf" if any(spec.norm == "linf" for spec in bounded) else "l2"
    sizes = sorted({spec.epsilon for spec in bounded if spec.epsilon and spec.norm == norm})
    if not sizes:
        return norm, {}
    clean = right(pairs[0].runtime)
    found = {}
    for size in sizes:
        lost = np.any([_lost(pair.spec, pair.runtime, norm, size) for pair in pairs], axis=0)
        found[size] = Proportion.of(clean & ~lost)
    return norm, found


def _lost(spec: AttackSpec, evidence: Evidence, norm: Norm, size: float) -> Mask:
    distance = evidence.linf if norm == "linf" else evidence.l2
    fooled = (evidence.status == "fooled") & (distance <= size * (1.0 + _ROUNDING))
    if spec.norm == norm and spec.epsilon is not None and spec.epsilon <= size:
        fooled |= evidence.status != "held"
    return np.asarray(fooled)
