"""Tables of results: built once, set by a terminal and by the report."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ccn_deploy.verdict import Verdict

NORMS = {"linf": "L∞ norm", "l2": "L2 norm"}
"""Norms as mathematics writes them."""


@dataclass(frozen=True)
class Mark:
    """A verdict as it is shown: a word, and the verdict that colours it."""

    word: str
    verdict: str

    @classmethod
    def of(cls, verdict: Verdict) -> Mark:
        """Mark a verdict by its own name."""
        return cls(verdict.value.capitalize(), verdict.value)


@dataclass(frozen=True)
class Cell:
    """What stands in one place of a table.

    Attributes:
        text: The number or the word.
        interval: Of a share in percent, both ends of its 95 % interval.
        note: What stands beside it, such as the bound of a drop.
    """

    text: str
    interval: tuple[float, float] | None = None
    note: str = ""


@dataclass(frozen=True)
class Row:
    """A row of a table; the verdict, if any, stands at its end."""

    name: str
    cells: Sequence[Cell]
    verdict: Mark | None = None


@dataclass(frozen=True)
class Table:
    """A table of numbers.

    Attributes:
        title: What it shows.
        columns: Heads of the rows' names and of every cell; a line break stands where a narrow
            table breaks it.
        rows: Each with a cell less than there are columns.
        about: How to read it, in a few sentences.
        judged: Head of the column of verdicts.
    """

    title: str
    columns: Sequence[str]
    rows: Sequence[Row]
    about: str = ""
    judged: str = "Verdict"

    @property
    def has_verdicts(self) -> bool:
        """Whether any row has one."""
        return any(row.verdict is not None for row in self.rows)


def texts(*values: object) -> list[Cell]:
    """Return cells of what is shown as it is."""
    return [Cell(str(value)) for value in values]


def percent(share: float) -> str:
    """Return a share in percent, without the sign."""
    return f"{100 * share:.1f}"


def number(value: float | None, digits: int = 3) -> str:
    """Return a number with so many decimals, or that there is none."""
    return "-" if value is None else f"{value:.{digits}f}"


def markdown(table: Table) -> str:
    """Return the rows of a table as Markdown, numbers to the right."""
    heads = [*table.columns, *([table.judged] if table.has_verdicts else [])]
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)]]
    for row in table.rows:
        verdicts = [row.verdict.word if row.verdict else ""] if table.has_verdicts else []
        lines.append([row.name.strip(), *map(cell_text, row.cells), *verdicts])
    return "\n".join(f"| {' | '.join(_escaped(text) for text in line)} |" for line in lines)


def _escaped(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def cell_text(cell: Cell) -> str:
    """Return what stands in a cell on one line: the number, its interval, its note."""
    parts = [cell.text]
    if cell.interval is not None:
        low, high = cell.interval
        parts.append(f"[{low:.0f}, {high:.0f}]")
    return " ".join(filter(None, [*parts, cell.note]))
