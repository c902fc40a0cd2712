"""Timing two programs against each other on a machine whose speed drifts."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

Work = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """How long ``a`` took for each unit of time that ``b`` took.

    Attributes:
        median: Of the ratios of neighbouring runs.
        low: Smallest of them.
        high: Largest of them.
        a_seconds: Median time of one run of ``a``.
        b_seconds: Median time of one run of ``b``.
    """

    median: float
    low: float
    high: float
    a_seconds: float
    b_seconds: float


def compare(a: Work, b: Work, *, rounds: int = 7) -> Ratio:
    """Run ``a`` and ``b`` in turn, after one run each to warm up, and return their ratio.

    Each ratio is of two runs next to one another, so a slow minute slows both.
    """
    a(), b()
    pairs = [(_time(a), _time(b)) for _ in range(rounds)]
    ratios = [x / y for x, y in pairs]
    return Ratio(
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        a_seconds=statistics.median(x for x, _ in pairs),
        b_seconds=statistics.median(y for _, y in pairs),
    )


def _time(work: Work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started
