"""Timing programs against one another on a machine whose speed drifts.

The clock is the processor's: seconds that this process computes. Everything measured runs on one
thread, so on an idle machine that is the time that passes, and on a busy one it leaves out the
turns of other programs, though not what they take from caches and memory.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Work = Callable[[], Any]


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
    pairs = [(seconds(a)[0], seconds(b)[0]) for _ in range(rounds)]
    ratios = [x / y for x, y in pairs]
    return Ratio(
        median=statistics.median(ratios),
        low=min(ratios),
        high=max(ratios),
        a_seconds=statistics.median(x for x, _ in pairs),
        b_seconds=statistics.median(y for _, y in pairs),
    )


@dataclass
class Times:
    """What :func:`in_turn` measured of one program.

    Attributes:
        seconds: Of each of its runs; they belong to the first rounds.
        result: What its last run returned.
    """

    seconds: list[float] = field(default_factory=list)
    result: Any = None

    @property
    def median(self) -> float:
        """Median time of one run."""
        return statistics.median(self.seconds)

    def faster_than(self, other: Times) -> float:
        """Return the median over the rounds that both ran of the other's time in that of this."""
        rounds = zip(other.seconds, self.seconds, strict=False)
        return statistics.median(theirs / ours for theirs, ours in rounds)


def in_turn(works: Mapping[str, Work], rounds: Mapping[str, int]) -> dict[str, Times]:
    """Run programs in turn, a b c a b c, each as many times as ``rounds`` says for its name."""
    found = {name: Times() for name in works}
    for turn in range(max(rounds.values())):
        for name, work in works.items():
            if turn < rounds[name]:
                took, found[name].result = seconds(work)
                found[name].seconds.append(took)
    return found


def seconds(work: Work) -> tuple[float, Any]:
    """Return the seconds that a program computed and what it returned."""
    started = time.process_time()
    result = work()
    return time.process_time() - started, result
