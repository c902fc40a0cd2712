"""What error each precision may have against float64. Imports no torch.

The figures are derived and measured in ``docs/parity.md``.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from ccn_deploy.errors import UsageError
from ccn_deploy.targets import precision_named


@dataclass(frozen=True)
class Arithmetic:
    """Unit roundoffs of an arithmetic, the largest relative error of rounding once.

    Attributes:
        store: Of weights and of what a layer hands to the next.
        accumulate: Of the sums inside a linear map.
        norm: Of the norm branch of compact layers.
        grid: ``"int8"`` or ``"fp8"`` where operands of products are put on a grid by a scale;
            empty where none are.
    """

    store: float
    accumulate: float
    norm: float
    grid: str = ""


@dataclass(frozen=True)
class Tolerance:
    """The error that a precision may have.

    Attributes:
        precision: For example ``"fp32"``.
        arithmetic: What the rounding model assumes.
        max_relative: Bound on the largest absolute error over the logit scale, which is the
            largest absolute reference logit of the same kind of input, and on a grid no less than
            that of clean images.
        max_units: Bound on the largest absolute error over the largest that the rounding model
            produced on the same kind of input.
    """

    precision: str
    arithmetic: Arithmetic
    max_relative: float
    max_units: float

    @property
    def max_gradient(self) -> float:
        """Bound on the largest error of a gradient over the largest slope, and on 1 - cosine.

        The same promise as for logits; it holds where rounding does not decide between two slopes.
        """
        return self.max_relative

    def stated_error(self, scale: float) -> float:
        """Return the absolute error this policy allows on logits of a scale.

        A label may differ from the reference's only where the reference's two largest logits are
        no further apart than this.
        """
        return self.max_relative * scale

    def document(self) -> dict[str, Any]:
        """Return the policy as it stands in reports."""
        return {**asdict(self), "max_gradient": self.max_gradient}


_U32 = 2.0**-24
_U16 = 2.0**-11
_UB16 = 2.0**-8

TOLERANCES: dict[str, Tolerance] = {
    policy.precision: policy
    for policy in (
        Tolerance("fp32", Arithmetic(_U32, _U32, _U32), max_relative=1e-4, max_units=8.0),
        Tolerance("fp16", Arithmetic(_U16, _U16, _U32), max_relative=2e-2, max_units=2.0),
        Tolerance("bf16", Arithmetic(_UB16, _U32, _U32), max_relative=5e-2, max_units=3.0),
        Tolerance("int8", Arithmetic(_U32, _U32, _U32, "int8"), max_relative=0.15, max_units=4.0),
        Tolerance("fp8", Arithmetic(_U32, _U32, _U32, "fp8"), max_relative=0.4, max_units=4.0),
    )
}


def tolerance_for(precision: str) -> Tolerance:
    """Look up the policy of a precision.

    Raises:
        UsageError: There is none; the hint lists those known.
    """
    if precision_named(precision).name not in TOLERANCES:
        raise UsageError(
            f"Nothing is deployed in {precision}: it is the reference's own.",
            f"Choose one of: {', '.join(TOLERANCES)}.",
        )
    return TOLERANCES[precision]
