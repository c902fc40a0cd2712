from __future__ import annotations

import json
import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from ccn_deploy.parity.comparison import (
    Deviation,
    compare_logits,
    compare_values,
    scale_of,
    top_two_margins,
)
from ccn_deploy.records import decode, encode

LOGITS = hnp.arrays(
    np.float64,
    st.tuples(st.integers(1, 30), st.integers(2, 6)),
    elements=st.floats(-100, 100, width=32),
)
QUICK = settings(max_examples=60, deadline=None)


def compare(found: NDArray[np.float64], expected: NDArray[np.float64]) -> Deviation:
    return compare_logits(found, expected, scale=scale_of(expected), unit=1.0)


@QUICK
@given(LOGITS, st.integers(0, 2**32 - 1), st.sampled_from([1e-6, 1e-2, 10.0]))
def test_agrees_with_the_definitions_by_hand(
    expected: NDArray[np.float64], seed: int, size: float
) -> None:
    found = expected + size * np.random.default_rng(seed).standard_normal(expected.shape)
    got = compare(found, expected)
    errors = sorted(
        abs(float(a) - float(b)) for a, b in zip(found.flat, expected.flat, strict=True)
    )
    assert got.n == len(expected)
    assert got.max_abs == errors[-1]
    assert got.p99_abs == errors[math.ceil(0.99 * (len(errors) - 1))]
    flips = []
    for a, b in zip(found.tolist(), expected.tolist(), strict=True):
        if a.index(max(a)) != b.index(max(b)):
            first, second = sorted(b)[-1], sorted(b)[-2]
            flips.append(first - second)
    assert got.argmax_flips == len(flips)
    assert [flip.margin for flip in got.flips] == sorted(flips, reverse=True)[:10]
    assert got.scale == max(abs(float(v)) for v in expected.flat)
    assert got.nonfinite == 0


@QUICK
@given(LOGITS)
def test_equal_logits_deviate_by_nothing_at_any_scale(expected: NDArray[np.float64]) -> None:
    for scale, unit in ((0.0, 0.0), (1.0, 1.0)):
        same = compare_logits(expected, expected, scale=scale, unit=unit)
        assert (same.max_abs, same.relative, same.units, same.argmax_flips) == (0, 0, 0, 0)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_one_non_finite_logit_is_counted_infinitely_wrong_and_without_a_label(bad: float) -> None:
    expected = np.array([[1.0, 5.0], [3.0, 2.0]])
    found = expected.copy()
    found[0, 0] = bad  # the largest logit is still the right one
    got = compare(found, expected)
    assert (got.nonfinite, got.argmax_flips, got.max_abs) == (1, 1, math.inf)
    assert got.flips[0].index == 0
    assert got.flips[0].margin == 4.0


def test_an_error_where_nothing_is_allowed_is_infinitely_large() -> None:
    got = compare_logits(np.full((1, 2), 1e-30), np.zeros((1, 2)), scale=0.0, unit=0.0)
    assert (got.relative, got.units) == (math.inf, math.inf)


def test_a_reference_that_is_not_finite_vouches_for_nothing() -> None:
    expected = np.array([[np.nan, 1.0]])
    assert scale_of(expected) == math.inf
    assert compare(np.array([[0.0, 1.0]]), expected).relative == math.inf


def test_margins_are_zero_at_ties() -> None:
    assert top_two_margins(np.array([[1.0, 4.0, 4.0], [0.5, -1.0, 0.0]])).tolist() == [0.0, 0.5]


def test_layers_are_compared_on_their_own_scale() -> None:
    expected = np.full((2, 3, 4, 4), 0.5)
    got = compare_values(expected + 0.001, expected, scale=scale_of(expected), unit=0.01)
    assert got.relative == pytest.approx(0.002)
    assert got.units == pytest.approx(0.1)


def test_json_knows_no_nan_and_comes_back_as_it_was() -> None:
    expected = np.array([[1.0, 2.0], [3.0, 4.0]])
    got = compare(np.array([[np.nan, 2.0], [5.0, 4.0]]), expected)
    text = encode(got)
    assert json.loads(text)["max_abs"] is None
    assert decode(text, Deviation, "the deviation", "") == got
