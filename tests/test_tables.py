"""Tables on a terminal: nothing is cut off, nothing is markup, verdicts stand at the end."""

from __future__ import annotations

import pytest

from ccn_deploy.cli import console
from ccn_deploy.cli.tables import show
from ccn_deploy.tables import Cell, Mark, Row, Table, number, percent, texts
from ccn_deploy.verdict import Verdict

TABLE = Table(
    title="Of [red]numbers[/]",
    columns=("Attack", "Reference\nPyTorch", "Drop"),
    rows=[
        Row("[bold]FGSM 0.1", [Cell("50.0", (36.8, 63.2)), Cell("+5.0", note="(12.42)")],
            Mark.of(Verdict.INCONCLUSIVE)),
        Row("mean rho", texts(number(0.25), number(None))),
    ],
)  # fmt: skip


def printed(capsys: pytest.CaptureFixture[str], width: int, table: Table = TABLE) -> list[str]:
    console.out.width = width
    try:
        show(table)
    finally:
        console.out._width = None
    return [line.rstrip() for line in capsys.readouterr().out.splitlines()]


def test_every_cell_is_shown_as_it_is(capsys: pytest.CaptureFixture[str]) -> None:
    title, first, second, _, fgsm, rho, end = printed(capsys, 80)
    assert title == "Of [red]numbers[/]"
    assert (first.split(), second.split()) == (
        ["Reference"],
        ["Attack", "PyTorch", "Drop", "Verdict"],
    )
    assert fgsm.split("  ") == ["[bold]FGSM 0.1", "50.0 [37, 63]", "+5.0 (12.42)", "inconclusive"]
    assert rho.split() == ["mean", "rho", "0.250", "-"]
    assert end == ""


def test_columns_move_together_before_anything_is_cut_off(
    capsys: pytest.CaptureFixture[str],
) -> None:
    widths = [max(map(len, printed(capsys, width))) for width in (80, 57, 54)]
    assert widths == [57, 57, 54]


def test_a_table_without_verdicts_has_no_column_for_them(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = Table("", ("Attack", "Seconds"), [Row("PGD", texts(1))])
    assert not any("Verdict" in line for line in printed(capsys, 80, table))


def test_a_share_is_in_percent() -> None:
    assert percent(0.12345) == "12.3"
    assert number(1.23456, 1) == "1.2"
