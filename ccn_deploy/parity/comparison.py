"""The arithmetic of comparing a runtime's numbers with the reference's. Imports no torch."""

from __future__ import annotations

import math

import msgspec
import numpy as np
from numpy.typing import NDArray

from ccn_deploy.records import Count, Extended, Measured
from ccn_deploy.runtimes.base import Array

FLIPS_KEPT = 10
"""Label flips that are described one by one, largest margin first; all are counted."""


class Flip(Measured, frozen=True):
    """An image whose label differs.

    Attributes:
        index: Of the image among those compared.
        expected: The reference's label.
        found: The runtime's label.
        margin: The reference's largest logit less its second largest.
    """

    index: Count
    expected: Count
    found: Count
    margin: Extended


class Deviation(Measured, frozen=True):
    """How far some values are from those they should be.

    Attributes:
        n: Images compared.
        max_abs: Largest absolute error; infinite where a value is not finite.
        p99_abs: 99th percentile of the absolute errors.
        argmax_flips: Images whose label differs, or that have no label for want of finite logits.
        flips: Those with the largest margins.
        nonfinite: Values that are NaN or infinite.
        scale: Largest absolute reference value of the same kind of input.
        unit: Largest absolute error that the rounding model produced on that kind of input.
    """

    n: Count
    max_abs: Extended
    p99_abs: Extended
    argmax_flips: Count
    flips: tuple[Flip, ...]
    nonfinite: Count
    scale: Extended
    unit: Extended = msgspec.field(name="rounding_unit")

    @property
    def relative(self) -> float:
        """Largest error over the scale; 0 for no error, whatever the scale."""
        return _ratio(self.max_abs, self.scale)

    @property
    def units(self) -> float:
        """Largest error over what rounding explains; 0 for no error, whatever the unit."""
        return _ratio(self.max_abs, self.unit)


def compare_logits(
    found: Array,
    expected: Array,
    *,
    scale: float,
    unit: float,
    margins: NDArray[np.float64] | None = None,
) -> Deviation:
    """Compare logits [N, classes] with those expected.

    Args:
        found: The runtime's.
        expected: The reference's, or the same runtime's under other circumstances.
        scale: See :class:`Deviation`.
        unit: See :class:`Deviation`.
        margins: Top-two margins [N] of the reference; those of ``expected`` if not given.
    """
    largest, p99, nonfinite = _errors(found, expected)
    margins = top_two_margins(expected) if margins is None else margins
    labels, wanted = found.argmax(axis=1), expected.argmax(axis=1)
    differs = (labels != wanted) | ~np.isfinite(found).all(axis=1)
    rows = np.flatnonzero(differs)
    rows = rows[np.argsort(-margins[rows], kind="stable")]
    return Deviation(
        n=len(found),
        max_abs=largest,
        p99_abs=p99,
        argmax_flips=len(rows),
        flips=tuple(
            Flip(int(row), int(wanted[row]), int(labels[row]), float(margins[row]))
            for row in rows[:FLIPS_KEPT]
        ),
        nonfinite=nonfinite,
        scale=scale,
        unit=unit,
    )


def compare_values(found: Array, expected: Array, *, scale: float, unit: float) -> Deviation:
    """Compare a layer's outputs [N, ...], which have no labels."""
    largest, p99, nonfinite = _errors(found, expected)
    return Deviation(len(found), largest, p99, 0, (), nonfinite, scale=scale, unit=unit)


def scale_of(reference: Array) -> float:
    """Return the largest absolute value; infinite where one is not finite."""
    largest = float(np.abs(reference).max(initial=0.0))
    return largest if math.isfinite(largest) else math.inf


def top_two_margins(logits: Array) -> NDArray[np.float64]:
    """Return the largest logit less the second largest, [N]; 0 where a logit is not finite."""
    top = np.partition(logits.astype(np.float64), -2, axis=1)[:, -2:]
    with np.errstate(invalid="ignore"):
        return np.asarray(np.nan_to_num(top[:, 1] - top[:, 0], nan=0.0, posinf=0.0))


def finite_or_none(value: float) -> float | None:
    """Return the number, or None for what JSON cannot say."""
    return value if math.isfinite(value) else None


def _errors(found: Array, expected: Array) -> tuple[float, float, int]:
    """Return largest and 99th percentile absolute error, and how many values are not finite."""
    with np.errstate(invalid="ignore"):
        errors = np.abs(found.astype(np.float64) - expected)
    errors[~np.isfinite(errors)] = math.inf
    if not errors.size:
        return 0.0, 0.0, 0
    # "higher" is an error that occurred; interpolating could meet inf - inf.
    p99 = float(np.quantile(errors, 0.99, method="higher"))
    return float(errors.max()), p99, int((~np.isfinite(found)).sum())


def _ratio(error: float, by: float) -> float:
    if error == 0.0:
        return 0.0
    if by == 0.0 or math.isinf(error) or math.isinf(by):  # nothing vouches for an infinite scale
        return math.inf
    return error / by
