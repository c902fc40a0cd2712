"""Does a runtime compute the function that the network is?

:func:`collect` measures a runtime against the float64 reference and keeps what it saw;
:func:`judge` compares that with the policy of the precision. Only a new measurement needs torch.
"""

from ccn_deploy.parity.collect import ParityRequest, collect
from ccn_deploy.parity.evidence import ParityEvidence
from ccn_deploy.parity.judge import ParityResult, judge
from ccn_deploy.parity.tolerances import Tolerance, tolerance_for

__all__ = [
    "ParityEvidence",
    "ParityRequest",
    "ParityResult",
    "Tolerance",
    "collect",
    "judge",
    "tolerance_for",
]
