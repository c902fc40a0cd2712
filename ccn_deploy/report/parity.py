"""The table of parity, from its document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ccn_deploy.tables import Mark, Row, Table, texts
from ccn_deploy.verdict import Verdict


def parity_table(parity: Mapping[str, Any]) -> Table:
    """Return a row per kind of input, with the worst of its batch sizes."""
    lines = []
    slopes = parity["gradients"]["rows"] if parity["gradients"] else []
    for kind in dict.fromkeys(row["kind"] for row in parity["inputs"]):
        rows = [row for row in parity["inputs"] if row["kind"] == kind]
        gradients = [row for row in slopes if row["kind"] == kind]
        verdict = Verdict.all_of(Verdict(row["verdict"]) for row in (*rows, *gradients))
        lines.append(
            Row(
                kind,
                texts(
                    ", ".join(str(row["batch"]) for row in rows),
                    _largest((row["max_abs"] for row in rows), "{:.1e}"),
                    _largest((row["rounding_units"] for row in rows), "{:.2f}"),
                    sum(row["argmax_flips"] for row in rows),
                    sum(row["nonfinite"] for row in rows),
                    _largest((row["relative"] for row in gradients), "{:.1e}") or "none",
                ),
                Mark.of(verdict),
            )
        )
    return Table(
        title="Parity with the float64 reference",
        columns=["Input", "Batches", "Largest error", "In rounding units", "Labels differ",
                 "Not finite", "Gradients"],
        rows=lines,
        about=f"Logits of {parity['runtime']}-{parity['precision']} against those of the network "
        "in float64, the worst of the batch sizes. A rounding unit is the largest error that a "
        "model of its rounding made. Gradients: the runtime's own, largest error over the largest "
        "slope, away from kinks.",
    )  # fmt: skip


def _largest(values: Iterable[float | None], form: str) -> str:
    """Return the largest value, "" of none; a document says null for one that is not finite."""
    found = list(values)
    if not found:
        return ""
    finite = [value for value in found if value is not None]
    return form.format(max(finite)) if len(finite) == len(found) else "not finite"
