"""What a study found: one record, from which every table, page and file is made."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any, Literal

import msgspec

from ccn_deploy.records import Count, Record, Text
from ccn_deploy.robustness import RobustnessResult
from ccn_deploy.robustness.non_inferiority import Proportion
from ccn_deploy.robustness.rows import MinimizationResult, MinimizationSide
from ccn_deploy.studies.study import Attacked, Column, FromSubstitute, Study, Transferred
from ccn_deploy.tables import NORMS, Cell, Row, Table, texts

SCHEMA: Literal["ccn-deploy/study/1"] = "ccn-deploy/study/1"


class CellRecord(Record, frozen=True, kw_only=True):
    """One number of a table.

    Attributes:
        row: What the row is called.
        column: Head of the column.
        value: On the deployed runtime, in percent or as a distance; the mean over seeds; None
            where there is none, as a mean distance of an attack that found nothing.
        low: Of its 95 % interval over the choice of images; with several seeds, the smallest.
        high: Likewise.
        seeds: One number a seed.
        n: Images behind each.
        reference: The same of the reference in PyTorch; None where it was not asked.
        paper: The paper's number; None where it has none.
        percentage: Whether it is one.
        text: What stands there, where it is no number.
    """

    row: Text
    column: Text
    value: float | None = None
    low: float | None = None
    high: float | None = None
    seeds: tuple[float | None, ...] = ()
    n: Count = 0
    reference: float | None = None
    paper: float | None = None
    percentage: bool = True
    text: Text = ""

    @property
    def difference(self) -> float | None:
        """Ours less the paper's, where there are both."""
        if self.value is None or self.paper is None:
            return None
        return self.value - self.paper


class ColumnRecord(Record, frozen=True, kw_only=True):
    """What a column asks.

    Attributes:
        head: As tables have it.
        question: ``"attack"``, ``"substitute"``, ``"transfer"`` or ``"architecture"``.
        attack: Everything that shapes the attack, if there is one.
        quantity: What is shown of it.
        strength: Epsilon, or d; None without one.
        crafted_on: The network that the images were made on, if it is another.
    """

    head: Text
    question: Literal["attack", "substitute", "transfer", "architecture"] = "attack"
    attack: dict[str, Any] = msgspec.field(default_factory=dict)
    quantity: Text = "accuracy"
    strength: float | None = None
    crafted_on: Text = ""


class ClaimRecord(Record, frozen=True):
    """What the paper says of a table, and whether our numbers agree; None if one is missing."""

    text: Text
    column: Text
    holds: bool | None

    @property
    def word(self) -> str:
        """What became of it."""
        return {True: "Holds", False: "Does not hold", None: "Not measured"}[self.holds]

    @property
    def sentence(self) -> str:
        """The claim and where it is made."""
        return f"{self.text} ({self.column})."


class StudyRecord(Record, frozen=True, kw_only=True):
    """One table.

    Attributes:
        name: Such as ``"table1"``.
        title: What it shows.
        first: Head of its first column.
        rows: What they are called.
        columns: What the others ask.
        cells: Every number.
        claims: What the paper says of them.
        findings: What a reader should know of the evidence behind them, a sentence each.
        ranked: Whether its rows are ranked.
    """

    name: Text
    title: Text
    first: Text
    rows: tuple[Text, ...]
    columns: tuple[ColumnRecord, ...]
    cells: tuple[CellRecord, ...]
    claims: tuple[ClaimRecord, ...] = ()
    findings: tuple[Text, ...] = ()
    ranked: bool = False


class StudiesRecord(Record, frozen=True, kw_only=True):
    """All that a call found, and what it was.

    Attributes:
        title: For people.
        dataset: Name, split and digest of the data.
        training: How the networks were trained: recipe, epochs, images; empty if they were given.
        paper: What the paper says of its training, for comparison; empty outside of a reproduction.
        budget: Name of the budget; empty outside of a reproduction.
        seeds: Of the trainings.
        runtime: What ran the networks.
        precision: In which.
        machine: Processor, system and packages.
        command: What the user typed.
        date: When it was put together, ISO 8601.
        studies: Table by table.
        figures: Names of the figures that lie beside it, and what each shows.
        notes: What a reader should know besides, a sentence each.
    """

    schema: Literal["ccn-deploy/study/1"]
    title: Text
    dataset: dict[str, Any]
    training: dict[str, Any]
    paper: Text = ""
    budget: Text = ""
    seeds: tuple[Count, ...]
    runtime: Text
    precision: Text
    machine: dict[str, Any]
    command: Text
    date: Text
    studies: tuple[StudyRecord, ...]
    figures: dict[Text, Text] = msgspec.field(default_factory=dict)
    notes: tuple[Text, ...] = ()


@dataclass(frozen=True)
class Measured:
    """An answer for one seed, in percent or as a distance."""

    value: float | None
    low: float | None
    high: float | None
    n: int
    reference: float | None = None


def of_attack(measure: Attacked, result: RobustnessResult) -> Measured:
    """Return the answer to a question about an attack from judged evidence."""
    if measure.quantity == "clean":
        return _shares(result.clean.runtime, result.clean.reference)
    if measure.spec.epsilon is not None:
        row = next(row for row in result.bounded if row.spec == measure.spec)
        return _shares(row.runtime, row.reference)
    found = next(row for row in result.minimal if row.spec.name == measure.spec.name)
    attack = found if measure.spec.clip else found.unclipped
    assert attack is not None
    if measure.quantity == "accuracy":
        assert measure.d is not None
        d = measure.d
        return _shares(attack.runtime.accuracy_at[d], attack.reference.accuracy_at[d])
    if measure.quantity == "success":
        return _shares(attack.runtime.found, attack.reference.found)
    return _distances(measure, attack)


def _distances(measure: Attacked, attack: MinimizationResult) -> Measured:
    def mean(side: MinimizationSide) -> float | None:
        found = side.rho_adv if measure.quantity.startswith("rho") else side.l2_mean
        scale = 100.0 if measure.quantity == "rho-percent" else 1.0
        return None if found is None else scale * found

    return Measured(mean(attack.runtime), None, None, attack.n, mean(attack.reference))


def of_counts(right: int, n: int) -> Measured:
    """Return the share of images that stayed right."""
    return _shares(Proportion(right, n))


def _shares(runtime: Proportion, reference: Proportion | None = None) -> Measured:
    low, high = runtime.ci95
    other = None if reference is None else 100 * reference.value
    return Measured(100 * runtime.value, 100 * low, 100 * high, runtime.n, other)


def cell(study: Study, row: str, column: Column, found: Sequence[Measured]) -> CellRecord:
    """Put the answers of every seed together."""
    values = [one.value for one in found]
    numbers = [value for value in values if value is not None]
    references = [one.reference for one in found if one.reference is not None]
    whole = len(numbers) == len(values)
    many = len(found) > 1 and whole
    return CellRecord(
        row=row,
        column=column.head,
        value=fmean(numbers) if whole else None,
        low=min(numbers) if many else found[0].low,
        high=max(numbers) if many else found[0].high,
        seeds=tuple(values),
        n=found[0].n,
        reference=fmean(references) if len(references) == len(found) else None,
        paper=study.paper(row, column),
        percentage=column.is_percentage,
    )


def claims(study: Study, cells: Sequence[CellRecord]) -> tuple[ClaimRecord, ...]:
    """Hold what the paper says against our numbers."""
    values = {(cell.row, cell.column): cell.value for cell in cells}
    return tuple(
        ClaimRecord(
            text=claim.text,
            column=claim.column,
            holds=claim.holds({row: values.get((row, claim.column)) for row in study.rows}),
        )
        for claim in study.claims
    )


def column_record(column: Column) -> ColumnRecord:
    """Return what a column asks, as it is written down."""
    measure = column.measure
    if isinstance(measure, FromSubstitute):
        return ColumnRecord(head=column.head, question="substitute", strength=measure.epsilon)
    clean = isinstance(measure, Attacked) and measure.quantity == "clean"
    strength = measure.spec.epsilon if isinstance(measure, Transferred) else measure.strength
    return ColumnRecord(
        head=column.head,
        question="transfer" if isinstance(measure, Transferred) else "attack",
        attack={} if clean else measure.spec.document(),
        quantity="accuracy" if isinstance(measure, Transferred) else measure.quantity,
        strength=strength,
        crafted_on=measure.crafted_on.name if isinstance(measure, Transferred) else "",
    )


def tables(study: StudyRecord, about: str = "") -> list[Table]:
    """Return a study as a table: below each of our rows the paper's, and the difference.

    Without numbers of the paper, a leaderboard comes first.
    """
    cells = {(cell.row, cell.column): cell for cell in study.cells}
    rows = []
    for name in study.rows:
        found = [cells[name, column.head] for column in study.columns]
        rows.append(Row(name, [_ours(one) for one in found]))
        if any(one.paper is not None for one in found):
            rows.append(Row("  paper", texts(*(_number(one.paper, one) for one in found))))
            rows.append(Row("  difference", texts(*(_difference(one) for one in found))))
    heads = [column.head for column in study.columns]
    number = study.name.removeprefix("table")
    title = f"Table {number}: {study.title}" if number.isdigit() else study.title
    table = Table(title, (study.first, *heads), rows, about)
    return [leaderboard(study), table] if study.ranked else [table]


def leaderboard(study: StudyRecord) -> Table:
    """Return the networks by what the strongest attack of each strength left, best first.

    The score is the mean of that over the strengths, in percent.
    """
    cells = {(cell.row, cell.column): cell for cell in study.cells}
    asked = [c for c in study.columns if c.quantity == "accuracy" and c.strength is not None]
    by_strength: dict[tuple[str, float], list[str]] = {}
    for column in asked:
        key = str(column.attack.get("norm", "")), float(column.strength or 0.0)
        by_strength.setdefault(key, []).append(column.head)

    def worst(row: str) -> list[float]:
        return [
            min(cells[row, head].value or 0.0 for head in heads) for heads in by_strength.values()
        ]

    scores = {row: (fmean(worst(row)) if by_strength else 0.0) for row in study.rows}
    order = sorted(study.rows, key=lambda row: -scores[row])
    heads = [f"worst at {norm and NORMS[norm].split()[0]} {at:g}" for norm, at in by_strength]
    return Table(
        f"Leaderboard: {study.title}",
        (study.first, "score", "clean", *heads),
        [
            Row(
                f"{place}. {row}",
                texts(
                    f"{scores[row]:.1f}",
                    _number(cells[row, "clean"].value, cells[row, "clean"]),
                    *(f"{value:.1f}" for value in worst(row)),
                ),
            )
            for place, row in enumerate(order, 1)
        ],
        "By the mean, over the strengths, of the lowest accuracy (%) that any of the attacks left.",
    )


def _ours(one: CellRecord) -> Cell:
    if one.text:
        return Cell(one.text)
    if len(one.seeds) > 1 and one.low is not None and one.high is not None:
        return Cell(
            _number(one.value, one), note=f"({_number(one.low, one)} to {_number(one.high, one)})"
        )
    return Cell(_number(one.value, one))


def _number(value: float | None, one: CellRecord) -> str:
    if value is None:
        return ""
    return f"{value:.1f}" if one.percentage else f"{value:.3f}"


def _difference(one: CellRecord) -> str:
    if one.difference is None:
        return ""
    return f"{one.difference:+.{1 if one.percentage else 3}f}"


def about(record: StudiesRecord, study: StudyRecord) -> str:
    """Return what the numbers of a table rest on, and how that differs from the paper's."""
    heads: dict[int, list[str]] = {}
    for one in study.cells:
        if one.n and one.column not in heads.setdefault(one.n, []):
            heads[one.n].append(one.column)
    if not heads:
        return ""
    (most, _), *others = sorted(heads.items(), key=lambda item: -len(item[1]))
    data, seeds = record.dataset, ", ".join(map(str, record.seeds))
    fewer = "".join(f", {n:,} under {' and '.join(names)}" for n, names in others)
    said = [f"{most:,} images of {data['name']} ({data['split']} split) a number{fewer}."]
    if record.training:
        training, many = record.training, len(record.seeds) > 1
        said.append(
            f"Networks trained on {training['images']:,} images, epochs {training['epochs']}, "
            f"recipe {training['recipe']}, seed{'s' * many} {seeds}{'; mean and range' * many}."
        )
    if record.paper:
        said.append(f"The paper's: {record.paper}.")
    return " ".join(said)


def to_csv(record: StudiesRecord) -> str:
    """Return every number on a line of its own, with what it rests on."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(
        ("study", "row", "column", "value", "low", "high", "n", "reference", "paper", "difference",
         "seeds", "dataset", "epochs", "recipe", "runtime", "precision")
    )  # fmt: skip
    training = record.training
    for study in record.studies:
        for one in study.cells:
            writer.writerow(
                (
                    *(study.name, one.row, one.column, one.value, one.low, one.high, one.n),
                    *(one.reference, one.paper, one.difference),
                    " ".join(map(str, record.seeds)),
                    *(record.dataset["name"], training.get("epochs"), training.get("recipe")),
                    *(record.runtime, record.precision),
                )
            )
    return file.getvalue()
