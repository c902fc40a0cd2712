"""How long calls take: programs timed in turn, percentiles, and the ratio of two of them.

The speed of a machine drifts, and what else runs on it comes and goes. Programs that are compared
take turns in short blocks, so that a slow second slows all of them, and a ratio is formed within
a round, of blocks next to one another.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Program = Callable[[], object]
Seconds = NDArray[np.float64]

BLOCK_SECONDS = 0.02
"""About how long a program runs before it is the next one's turn."""

FEWEST_CALLS = 10
"""Calls of each program at least, however long they take."""


@dataclass(frozen=True)
class Latency:
    """Of calls of one program.

    Attributes:
        batch: Images a call.
        calls: How many were timed.
        p50: Seconds that half of the calls stay within; likewise below.
        p90: Of the slowest tenth the fastest; None for fewer than 10 calls.
        p99: Of the slowest hundredth the fastest; None for fewer than 100 calls, which have no
            such thing.
        images_per_second: All images by the whole time.
    """

    batch: int
    calls: int
    p50: float
    p90: float | None
    p99: float | None
    images_per_second: float

    @classmethod
    def of(cls, seconds: Seconds, batch: int) -> Latency:
        """Summarise the seconds of each call, float64 [calls]."""

        def percentile(which: int) -> float:
            return float(np.percentile(seconds, which))

        return cls(
            batch=batch,
            calls=len(seconds),
            p50=percentile(50),
            p90=percentile(90) if len(seconds) >= 10 else None,
            p99=percentile(99) if len(seconds) >= 100 else None,
            images_per_second=batch * len(seconds) / float(seconds.sum()),
        )


@dataclass(frozen=True)
class Ratio:
    """The time of one program by that of another.

    Attributes:
        median: Of the rounds.
        low: A quarter of the rounds lie below.
        high: A quarter of the rounds lie above.
    """

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, a: Sequence[Seconds], b: Sequence[Seconds]) -> Ratio:
        """Compare the blocks of two programs that took turns, round by round.

        A block counts by its median, so that one interrupted call does not carry a round.
        """
        rounds = [float(np.median(x) / np.median(y)) for x, y in zip(a, b, strict=True)]
        low, median, high = (float(q) for q in np.percentile(rounds, (25, 50, 75)))
        return cls(median, low, high)


def take_turns(
    programs: Sequence[Program],
    *,
    seconds: float = 1.0,
    calls: int | None = None,
    warm_up: int = 10,
    clock: Callable[[], float] = time.perf_counter,
) -> list[list[Seconds]]:
    """Time every call of programs that run in turn, block by block.

    Every block begins with a call that is not timed: it brings the program's weights back into
    the caches, where a program that runs alone has them.

    Args:
        programs: What to call.
        seconds: Each program is called for at least that long, and :data:`FEWEST_CALLS` times.
        calls: Calls of each program, instead of ``seconds``.
        warm_up: Calls before the first that is timed.
        clock: Gives seconds.

    Returns:
        For each program its blocks, one a round, each float64 [calls of the block]. In a round
        all programs are called equally often.
    """
    slowest = 0.0
    for program in programs:
        for _ in range(warm_up):
            program()
        slowest = max(slowest, _timed(program, 1, clock).sum())
    block = int(min(max(BLOCK_SECONDS / slowest, 1), 100)) if slowest > 0 else 100
    blocks: list[list[Seconds]] = [[] for _ in programs]
    made, spent = 0, [0.0] * len(programs)
    while made < calls if calls is not None else made < FEWEST_CALLS or min(spent) < seconds:
        size = block if calls is None else min(block, calls - made)
        for index, program in enumerate(programs):
            program()
            blocks[index].append(_timed(program, size, clock))
            spent[index] += float(blocks[index][-1].sum())
        made += size
    return blocks


def _timed(program: Program, calls: int, clock: Callable[[], float]) -> Seconds:
    seconds = np.empty(calls, np.float64)
    for call in range(calls):
        started = clock()
        program()
        seconds[call] = clock() - started
    return seconds
