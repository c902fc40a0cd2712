"""Low precision as a pass over any float32 graph; ``docs/precision.md`` is for users.

Whatever the precision, norms, normalisations and exponentials stay float32 by a structural rule
that :func:`check_precision` asserts on the converted graph.
"""

from ccn_deploy.exporters.precision.calibration import METHODS, Calibration
from ccn_deploy.exporters.precision.convert import PRECISIONS, Converted, convert
from ccn_deploy.exporters.precision.ranges import NumericReport, numeric_report
from ccn_deploy.exporters.precision.structure import check_precision

__all__ = [
    "METHODS",
    "PRECISIONS",
    "Calibration",
    "Converted",
    "NumericReport",
    "check_precision",
    "convert",
    "numeric_report",
]
