"""Where studies keep what they found: a directory for each data set and budget.

::

    reproduction/
        results.md, index.html              of all data sets and budgets together
        mnist5k-quick/
            results.json, results.csv       every number
            figures/                        SVG and PNG
            runs/, bundles/, counts/        what they were made from
"""

from __future__ import annotations

from pathlib import Path

import msgspec

from ccn_deploy.records import decode, encode
from ccn_deploy.storage import write_atomic
from ccn_deploy.studies.page import html, to_markdown
from ccn_deploy.studies.results import StudiesRecord, to_csv
from ccn_deploy.studies.run import FIGURES

RESULTS = "results.json"
_SAME = ("dataset", "training", "budget", "seeds", "runtime", "precision", "machine")
"""What two records must agree in to be one."""


def merged(root: Path, record: StudiesRecord) -> StudiesRecord:
    """Return a record in order, with what an earlier call in the same setting found besides."""
    studies = {study.name: study for study in record.studies}
    figures = record.figures
    before = read(root)
    if before is not None and all(getattr(before, n) == getattr(record, n) for n in _SAME):
        studies = {**{study.name: study for study in before.studies}, **studies}
        figures = {**before.figures, **figures}
    ordered = sorted(studies.values(), key=lambda study: _place(study.name))
    return msgspec.structs.replace(
        record,
        studies=tuple(ordered),
        figures={name: figures[name] for name in sorted(figures, key=_place)},
    )


def _place(name: str) -> tuple[str, int, str]:
    """Sort table2 before table10."""
    digits = "".join(filter(str.isdigit, name))
    return name.rstrip("0123456789"), int(digits or 0), name


def read(root: Path) -> StudiesRecord | None:
    """Return what a directory holds, if anything.

    Raises:
        IntegrityError: It is damaged.
    """
    path = root / RESULTS
    if not path.is_file():
        return None
    return decode(path.read_bytes(), StudiesRecord, str(path), f"Delete {path}: it is made again.")


def write(root: Path, record: StudiesRecord) -> None:
    """Write a record as JSON and CSV.

    Raises:
        StorageError: The directory cannot be written to; what was there before is as it was.
    """
    write_atomic(root / "results.csv", to_csv(record).encode())
    write_atomic(root / RESULTS, encode(record))


def write_pages(output: Path, intro: str) -> tuple[Path, Path]:
    """Write one page of HTML and one of Markdown of all records below a directory.

    Returns:
        Both paths.

    Raises:
        StorageError: The directory cannot be written to.
        IntegrityError: A record is damaged.
    """
    roots = sorted(path.parent for path in output.glob(f"*/{RESULTS}"))
    found = [(record, root / FIGURES) for root in roots if (record := read(root)) is not None]
    page, text = output / "index.html", output / "results.md"
    write_atomic(page, html(found).encode())
    write_atomic(text, to_markdown(found, intro).encode())
    return page, text
