"""Which images are right, and stay right, according to evidence: masks of length n."""

from __future__ import annotations

import numpy as np

from ccn_deploy.attacks.spec import Norm
from ccn_deploy.robustness.evidence import Evidence
from ccn_deploy.robustness.non_inferiority import Mask


def right(evidence: Evidence) -> Mask:
    """Right without an attack."""
    return np.asarray(evidence.clean_runtime == evidence.label)


def robust(evidence: Evidence) -> Mask:
    """Right, and right under an attack with an epsilon; not so where nothing was shown."""
    return np.asarray(evidence.status == "held")


def robust_within(evidence: Evidence, norm: Norm, d: float) -> Mask:
    """Right, and the smallest perturbation that was found is larger than d, or none was.

    In L2, d is relative to the norm of the image (paper, equation 8). In Linf it is in pixel values
    of [0, 1], as epsilon is.
    """
    size = evidence.rho if norm == "l2" else evidence.linf
    far = (evidence.status == "fooled") & (size > d)
    return np.asarray((evidence.status == "held") | far)


def invalid(evidence: Evidence) -> int:
    """Return for how many images the attack returned no legal image."""
    return int((evidence.status == "invalid").sum())
