"""Robustness of what is deployed: attack it, keep the evidence, judge it.

:func:`collect` attacks and needs the extra ``train``; :func:`judge` only reads evidence and
needs SciPy for its intervals.
"""

from ccn_deploy.robustness.collect import Measurement, Pair, RobustnessRequest, collect, collect_all
from ccn_deploy.robustness.evidence import Evidence, Sample
from ccn_deploy.robustness.judge import judge
from ccn_deploy.robustness.precisions import PrecisionsResult, compare
from ccn_deploy.robustness.recheck import Recheck, recheck
from ccn_deploy.robustness.result import RobustnessResult

__all__ = [
    "Evidence",
    "Measurement",
    "Pair",
    "PrecisionsResult",
    "Recheck",
    "RobustnessRequest",
    "RobustnessResult",
    "Sample",
    "collect",
    "collect_all",
    "compare",
    "judge",
    "recheck",
]
