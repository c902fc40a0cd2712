"""What studies found, as a page of HTML and as Markdown."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from ccn_deploy import __version__
from ccn_deploy.report.html import render_template
from ccn_deploy.report.view import Fact
from ccn_deploy.studies.results import ClaimRecord, StudiesRecord, StudyRecord, about, tables
from ccn_deploy.tables import Table, markdown

UPPER_BOUND = (
    "Accuracy under attack is an upper bound: it says that these attacks got no further, not that "
    "a better one could not."
)
_AUDIT = (
    " The last columns of a table, the audit's worst case, are ours and not the paper's: read them "
    "before any other."
)


@dataclass(frozen=True)
class Section:
    """The tables of a study, what the paper says of them, and what a reader should know."""

    tables: Sequence[Table]
    claims: Sequence[ClaimRecord]
    findings: Sequence[str]


@dataclass(frozen=True)
class Picture:
    """A figure, its source a data URI."""

    title: str
    source: str


@dataclass(frozen=True)
class Part:
    """The studies on one data set."""

    title: str
    sections: Sequence[Section]
    figures: Sequence[Picture]
    command: str
    facts: Sequence[Fact]
    notes: Sequence[str]


@dataclass(frozen=True)
class StudyPage:
    """Everything that the page shows."""

    overline: str
    title: str
    about: str
    parts: Sequence[Part]
    version: str = __version__


def html(records: Sequence[tuple[StudiesRecord, Path]]) -> str:
    """Return one page for the lot; it loads nothing and runs no script.

    Args:
        records: What was found, each with the directory of its figures.

    Raises:
        MissingExtraError: jinja2 is not installed.
    """
    parts = [_part(record, directory) for record, directory in records]
    first = records[0][0]
    overline = "Reproduction" if first.paper else "Study"
    said = UPPER_BOUND + (_AUDIT if first.paper else "")
    return render_template("studies.html.j2", page=StudyPage(overline, first.title, said, parts))


def _part(record: StudiesRecord, directory: Path) -> Part:
    figures = [
        Picture(title, _uri((directory / f"{name}.svg").read_bytes()))
        for name, title in record.figures.items()
    ]
    shown = [
        Section(tables(study, about(record, study)), study.claims, study.findings)
        for study in record.studies
    ]
    return Part(_title(record), shown, figures, record.command, _facts(record), record.notes)


def _title(record: StudiesRecord) -> str:
    budget = f", budget {record.budget}" if record.budget else ""
    return f"{record.dataset['name']}{budget}"


def _uri(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _facts(record: StudiesRecord) -> list[Fact]:
    packages = record.machine["packages"]
    names = ("ccn-deploy", "torch", "onnxruntime", "numpy", "foolbox")
    versions = ", ".join(f"{name} {packages[name]}" for name in names if name in packages)
    return [
        Fact("Data", f"{record.dataset['name']}, {record.dataset['split']} split"),
        Fact("Digest of the data", record.dataset["digest"], code=True),
        Fact("Runtime", f"{record.runtime}, {record.precision}"),
        Fact("Machine", f"{record.machine['processor']}, {record.machine['system']}"),
        Fact("Versions", versions),
        Fact("Date", record.date),
    ]


def to_markdown(records: Sequence[tuple[StudiesRecord, Path]], intro: str) -> str:
    """Return the same as Markdown, without the figures.

    Args:
        records: What was found, each with the directory of its figures.
        intro: What stands above all.
    """
    lines = [intro.rstrip(), ""]
    for record, _ in records:
        if len(records) > 1:
            lines += [f"## {_title(record)}", ""]
        level = "###" if len(records) > 1 else "##"
        for study in record.studies:
            for table in tables(study, about(record, study)):
                lines += [f"{level} {table.title}", "", table.about, ""]
                lines += [markdown(table), ""]
            lines += [*_notes(study)]
        facts = "; ".join(f"{fact.name.lower()} {fact.value}" for fact in _facts(record))
        lines += [*(f"* {note}" for note in record.notes), *([""] if record.notes else [])]
        lines += [f"Made by `{record.command}`: {facts}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _notes(study: StudyRecord) -> list[str]:
    claims = [f"* {claim.word}: {claim.sentence}" for claim in study.claims]
    findings = [f"* Undermined: {sentence}" for sentence in study.findings]
    return [*claims, *findings, ""] if claims or findings else []
