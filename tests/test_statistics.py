"""Intervals against sums of binomial tails, the score equation solved numerically, and coverage."""

from __future__ import annotations

import math
from fractions import Fraction
from functools import cache

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize_scalar
from scipy.stats import norm

from ccn_deploy.statistics import clopper_pearson, drop_upper_bound, samples_needed, wilson


def tail(k: int, n: int, p: float) -> float:
    """Return P(X >= k) for X binomial, added up term by term."""
    return math.fsum(math.comb(n, i) * p**i * (1 - p) ** (n - i) for i in range(k, n + 1))


counts = st.integers(1, 60).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n)))


@settings(deadline=None, max_examples=60)
@given(counts=counts, confidence=st.sampled_from([0.8, 0.9, 0.95, 0.99]))
def test_clopper_pearson_ends_where_the_binomial_tails_are_half_of_what_is_left(
    counts: tuple[int, int], confidence: float
) -> None:
    k, n = counts
    low, high = clopper_pearson(k, n, confidence)
    half = (1 - confidence) / 2
    assert 0 <= low <= k / n <= high <= 1
    if k == 0:
        assert low == 0
    else:
        assert tail(k, n, low) == pytest.approx(half, rel=1e-6)
    if k == n:
        assert high == 1
    else:
        assert 1 - tail(k + 1, n, high) == pytest.approx(half, rel=1e-6)


@settings(deadline=None, max_examples=40)
@given(counts=counts, confidence=st.sampled_from([0.8, 0.95, 0.99]))
def test_wilson_ends_where_the_score_statistic_is_the_quantile(
    counts: tuple[int, int], confidence: float
) -> None:
    k, n = counts
    quantile = norm.ppf((1 + confidence) / 2)
    for end in wilson(k, n, confidence):
        score = (k / n - end) ** 2
        assert score == pytest.approx(quantile**2 * end * (1 - end) / n, abs=1e-9)


def test_known_intervals() -> None:
    low, high = clopper_pearson(900, 1000)
    assert (round(low, 3), round(high, 3)) == (0.880, 0.918)
    assert clopper_pearson(0, 10)[1] == pytest.approx(1 - 0.025 ** (1 / 10), rel=1e-9)


@pytest.mark.parametrize("interval", [clopper_pearson, wilson])
def test_no_trials_say_nothing(interval: object) -> None:
    assert interval(0, 0) == (0.0, 1.0)  # type: ignore[operator]


@pytest.mark.parametrize("p", [0.02, 0.3, 0.9])
def test_clopper_pearson_covers_the_truth_at_least_as_often_as_it_says(p: float) -> None:
    n, covered = 40, 0.0
    for k in range(n + 1):
        low, high = clopper_pearson(k, n, 0.95)
        if low <= p <= high:
            covered += math.comb(n, k) * p**k * (1 - p) ** (n - k)
    assert covered >= 0.95


# The bound on a paired drop.


def test_a_thousand_samples_and_one_percent_tolerate_four_lost() -> None:
    assert drop_upper_bound(4, 0, 1000) <= 0.01
    assert drop_upper_bound(5, 0, 1000) > 0.01


def test_five_hundred_samples_cannot_show_half_a_percent() -> None:
    assert drop_upper_bound(0, 0, 500) > 0.005
    assert samples_needed(0.005) > 500


def test_no_samples_show_nothing() -> None:
    assert drop_upper_bound(0, 0, 0) == 1.0


@settings(deadline=None, max_examples=40)
@given(counts=counts, confidence=st.sampled_from([0.9, 0.95, 0.99]))
def test_with_nothing_gained_the_bound_is_exact(counts: tuple[int, int], confidence: float) -> None:
    lost, n = counts
    bound = drop_upper_bound(lost, 0, n, confidence)
    if lost == n:
        assert bound == 1
    else:  # at this rate, so few lost would have been this unlikely
        assert 1 - tail(lost + 1, n, bound) == pytest.approx(1 - confidence, rel=1e-6)


def score(lost: int, gained: int, n: int, drop: float) -> float:
    """Return the score statistic with the gained share found by maximising the likelihood."""
    rest = n - lost - gained

    def cost(q: float) -> float:
        parts = [(lost, q + drop), (gained, q), (rest, 1 - 2 * q - drop)]
        return -sum(count * math.log(max(p, 1e-300)) for count, p in parts if count)

    low, high = max(0.0, -drop), (1 - drop) / 2
    q = minimize_scalar(cost, bounds=(low, high), method="bounded", options={"xatol": 1e-13}).x
    return (lost - gained - n * drop) / math.sqrt(n * (2 * q + drop * (1 - drop)))


pairs = st.integers(2, 400).flatmap(
    lambda n: st.tuples(st.integers(0, n - 1), st.integers(1, n), st.just(n))
).filter(lambda c: c[0] + c[1] <= c[2])  # fmt: skip


@settings(deadline=None, max_examples=80)
@given(counts=pairs, confidence=st.sampled_from([0.9, 0.95, 0.99]))
@example(counts=(3, 9, 1000), confidence=0.95)
@example(counts=(0, 1, 1000), confidence=0.95)
def test_tangos_bound_is_where_the_score_statistic_is_the_quantile(
    counts: tuple[int, int, int], confidence: float
) -> None:
    lost, gained, n = counts
    bound = drop_upper_bound(lost, gained, n, confidence)
    assert (lost - gained) / n <= bound < 1
    quantile = norm.ppf(confidence)
    # The statistic falls as the drop rises: it must cross minus the quantile at the bound.
    step = 1e-4 * (1 - bound)
    assert score(lost, gained, n, bound - step) > -quantile
    assert score(lost, gained, n, bound + step) < -quantile


@cache
def bounds(n: int) -> dict[tuple[int, int], float]:
    return {
        (lost, gained): drop_upper_bound(lost, gained, n)
        for lost in range(n + 1)
        for gained in range(n + 1 - lost)
    }


@pytest.mark.parametrize(
    ("losing", "gaining"), [(0.02, 0.01), (0.05, 0.05), (0.2, 0.1), (0.1, 0.3), (0.3, 0.0)]
)
def test_the_bound_covers_the_true_drop_about_as_often_as_it_says(
    losing: float, gaining: float
) -> None:
    n, covered = 30, 0.0
    for (lost, gained), bound in bounds(n).items():
        if bound >= losing - gaining:
            ways = math.comb(n, lost) * math.comb(n - lost, gained)
            rest = (1 - losing - gaining) ** (n - lost - gained)
            covered += ways * losing**lost * gaining**gained * rest
    # Exact enumeration; a score interval may fall a little short of its level on few samples.
    assert covered >= (0.95 if gaining == 0 else 0.93)


def test_the_bound_rises_with_losses_and_falls_with_samples() -> None:
    by_losses = [drop_upper_bound(lost, 3, 200) for lost in range(20)]
    assert by_losses == sorted(by_losses)
    by_samples = [drop_upper_bound(2, 1, n) for n in (10, 50, 100, 1000)]
    assert by_samples == sorted(by_samples, reverse=True)


@pytest.mark.parametrize("n", [1, 2, 10])
def test_extreme_counts_give_a_number(n: int) -> None:
    for lost, gained in [(0, n), (n, 0), (n - 1, 1), (0, 1), (0, 0)]:
        bound = drop_upper_bound(lost, gained, n)
        assert math.isfinite(bound)
        assert (lost - gained) / n <= bound <= 1


@settings(deadline=None, max_examples=60)
@given(st.floats(1e-4, 0.999), st.sampled_from([0.9, 0.95, 0.99]))
def test_samples_needed_is_the_fewest(max_drop: float, confidence: float) -> None:
    n = samples_needed(max_drop, confidence)
    chance = Fraction(1) - Fraction(max_drop)  # of losing nothing, per sample
    level = 1 - confidence
    assert float(chance**n) <= level * (1 + 1e-9)
    assert n == 1 or float(chance ** (n - 1)) > level * (1 - 1e-9)
    assert drop_upper_bound(0, 0, n, confidence) <= max_drop * (1 + 1e-9)


@pytest.mark.parametrize(("max_drop", "needed"), [(0.01, 299), (0.005, 598), (0.05, 59), (1.0, 1)])
def test_samples_needed_known_values(max_drop: float, needed: int) -> None:
    assert samples_needed(max_drop) == needed


@pytest.mark.parametrize("max_drop", [0.0, -0.1])
def test_no_number_of_samples_shows_no_drop_at_all(max_drop: float) -> None:
    with pytest.raises(ValueError):
        samples_needed(max_drop)


def test_results_are_plain_floats() -> None:
    numbers = [*clopper_pearson(3, 10), *wilson(3, 10), drop_upper_bound(3, 1, 10)]
    assert all(type(number) is float for number in numbers)
    assert not any(isinstance(number, np.generic) for number in numbers)
