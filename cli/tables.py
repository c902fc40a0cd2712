"""Tables and verdicts on a terminal."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ccn_deploy.tables import Mark, Table
    from ccn_deploy.verdict import Verdict

_COLOURS = {"pass": "green", "fail": "bold red", "inconclusive": "yellow"}


def show(table: Table, words: int = 1) -> None:
    """Print a table and an empty line, its columns closer together where space is short.

    Args:
        table: What to print; what it says about itself is left to the report.
        words: How many columns, from the first, hold words and stand on the left.
    """
    from rich import box
    from rich.markup import escape
    from rich.table import Table as RichTable

    from ccn_deploy.cli.console import out
    from ccn_deploy.tables import cell_text

    heads = [*table.columns, *([table.judged] if table.has_verdicts else [])]
    rows = [
        [
            row.name,
            *map(cell_text, row.cells),
            *([_word(row.verdict)] if table.has_verdicts else []),
        ]
        for row in table.rows
    ]
    columns = list(zip(heads, *rows, strict=True))
    widths = [max(len(line) for text in texts for line in text.split("\n")) for texts in columns]
    roomy = sum(widths) + 2 * (len(widths) - 1) <= out.width
    made = RichTable(
        box=box.SIMPLE_HEAD,
        pad_edge=False,
        padding=(0, 1, 0, 0) if roomy else 0,
        show_edge=False,
    )
    for at, head in enumerate(heads):
        left = at < words or at == len(table.columns)
        made.add_column(escape(head), justify="left" if left else "right", no_wrap=True)
    for row, texts in zip(table.rows, rows, strict=True):
        shown = [escape(text) for text in texts]
        if row.verdict is not None:
            shown[-1] = f"[{_COLOURS[row.verdict.verdict]}]{shown[-1]}[/]"
        made.add_row(*shown)
    if table.title:
        out.print(f"[bold]{escape(table.title)}[/]", soft_wrap=True)
    out.print(made)
    out.print()


def show_verdict(verdict: Verdict, why: str) -> None:
    """Print the last line of a command that judges."""
    from ccn_deploy.cli.console import out

    colour = _COLOURS[verdict.value].split()[-1]
    out.print(f"[bold {colour}]{verdict.value.upper()}[/]: {why}", soft_wrap=True)


def _word(mark: Mark | None) -> str:
    return "" if mark is None else mark.word.lower()
