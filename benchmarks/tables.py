"""Markdown, ready for ``docs/benchmarks.md``."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from benchmarks.timing import Ratio

Row = tuple[str, str, str, str, Ratio]
"""What, of which network, a, b, how long a took for each unit of time of b."""


def table(columns: Iterable[str], rows: Iterable[Iterable[str]]) -> Iterator[str]:
    """Yield the lines of a table, each as soon as its row is there."""
    columns = list(columns)
    yield _line(columns)
    yield _line("---" for _ in columns)
    for row in rows:
        yield _line(row)


def ratios(rows: Iterable[Row]) -> Iterator[str]:
    """Yield the lines of a table of ratios."""
    columns = ("what", "network", "a", "b", "time of a / time of b", "range", "a", "b")
    return table(columns, (_ratio(*row) for row in rows))


def _ratio(what: str, network: str, a: str, b: str, ratio: Ratio) -> tuple[str, ...]:
    return (
        *(what, network, a, b, f"**{ratio.median:.2f}**"),
        f"{ratio.low:.2f} to {ratio.high:.2f}",
        *(_duration(ratio.a_seconds), _duration(ratio.b_seconds)),
    )


def _line(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _duration(seconds: float) -> str:
    return f"{seconds * 1000:.0f} ms" if seconds < 1 else f"{seconds:.2f} s"
