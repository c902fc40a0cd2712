"""Intervals for proportions, and the bound that a release gate rests on."""

from __future__ import annotations

import math
from typing import Any

from ccn_deploy.extras import require

CONFIDENCE = 0.95


def clopper_pearson(
    successes: int, trials: int, confidence: float = CONFIDENCE
) -> tuple[float, float]:
    """Return the exact two-sided interval of a proportion (Clopper and Pearson, 1934).

    Covers the truth at least ``confidence`` of the time, whatever it is. With no trials the
    interval is [0, 1].
    """
    return _interval(successes, trials, confidence, "exact")


def wilson(successes: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return Wilson's two-sided score interval (1927): shorter, for plots, not for gates."""
    return _interval(successes, trials, confidence, "wilson")


def drop_upper_bound(lost: int, gained: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return a one-sided upper bound on how much worse a second classifier is, paired.

    With ``lost`` samples right on the first and wrong on the second, and ``gained`` the other way
    round, the drop in accuracy is ``(lost - gained) / trials``. When nothing was gained the bound
    is Clopper and Pearson's on ``lost / trials``, exact; otherwise Tango's score bound for paired
    differences (Statistics in Medicine 17, 1998, equation 10).

    Args:
        lost: Samples that only the first classifier gets right.
        gained: Samples that only the second gets right.
        trials: All samples.
        confidence: Of the one-sided bound.
    """
    if trials == 0:
        return 1.0
    if gained == 0:
        return clopper_pearson(lost, trials, 2 * confidence - 1)[1]
    quantile = float(_stats().norm.ppf(confidence))
    optimize = require("scipy.optimize", "train", "to compute intervals")
    drop = (lost - gained) / trials
    return float(
        optimize.brentq(lambda d: _tango(lost, gained, trials, d) + quantile, drop, 1.0 - 1e-12)
    )


def share_lower_bound(successes: int, trials: int, confidence: float = CONFIDENCE) -> float:
    """Return Clopper and Pearson's one-sided lower bound of a proportion; 0 without trials."""
    return clopper_pearson(successes, trials, 2 * confidence - 1)[0]


def trials_needed(
    successes: int, trials: int, share: float, confidence: float = CONFIDENCE
) -> int | None:
    """Return how many trials would show a proportion of ``share`` if they went on like these.

    Args:
        successes: Seen so far.
        trials: Seen so far, at least one.
        share: Which the one-sided lower bound is to reach.
        confidence: Of the bound.

    Returns:
        About the fewest; exactly those if none failed. None if no thousandfold would do.
    """
    if successes == trials:
        return None if share >= 1.0 else math.ceil(math.log1p(-confidence) / math.log(share))
    for factor in (1.05**k for k in range(1, 142)):
        n = math.ceil(trials * factor)
        if share_lower_bound(successes * n // trials, n, confidence) >= share:
            return n
    return None


def samples_needed(max_drop: float, confidence: float = CONFIDENCE) -> int:
    """Return the fewest samples that can show a drop of at most ``max_drop``, none being lost."""
    if max_drop <= 0.0:
        raise ValueError("no number of samples can show a drop of exactly zero")
    if max_drop >= 1.0:
        return 1
    return math.ceil(math.log1p(-confidence) / math.log1p(-max_drop))


def sign_test(more: int, fewer: int) -> float:
    """Return how likely a fair coin falls ``more`` times or oftener in ``more + fewer`` throws.

    Of pairs that differ, that is the exact one-sided test of McNemar (1947): whether the one kind
    is commoner than the other by more than chance.
    """
    return float(_stats().binom.sf(more - 1, more + fewer, 0.5))


def _tango(lost: int, gained: int, trials: int, drop: float) -> float:
    """Return the score statistic of ``difference == drop``; falls as ``drop`` rises."""
    a = 2.0 * trials
    b = -lost - gained + (2 * trials - lost + gained) * drop
    c = -gained * drop * (1.0 - drop)
    q = (math.sqrt(max(b * b - 4 * a * c, 0.0)) - b) / (2 * a)  # gained share, given the drop
    variance = trials * (2 * q + drop * (1.0 - drop))
    difference = lost - gained - trials * drop
    return difference / math.sqrt(variance) if variance > 0 else math.copysign(math.inf, difference)


def _interval(successes: int, trials: int, confidence: float, method: str) -> tuple[float, float]:
    if trials == 0:
        return 0.0, 1.0
    interval = _stats().binomtest(successes, trials).proportion_ci(confidence, method)
    return float(interval.low), float(interval.high)


def _stats() -> Any:
    return require("scipy.stats", "train", "to compute intervals")
