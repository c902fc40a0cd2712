"""The tables of parity, from its document."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from ccn_deploy.tables import Mark, Row, Table, texts
from ccn_deploy.verdict import Verdict


def parity_tables(parity: Mapping[str, Any]) -> list[Table]:
    """Return how far the runtime is from the reference: its answers, and its layers if there.

    Args:
        parity: A document of schema ``ccn-deploy/parity/2``.
    """
    return [parity_table(parity), *([layer_table(parity)] if parity.get("layers") else [])]


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


def layer_table(parity: Mapping[str, Any]) -> Table:
    """Return a row per layer in order of execution, with the worst of its kinds of input."""
    lines = []
    for layer in dict.fromkeys(row["layer"] for row in parity["layers"]):
        rows = [row for row in parity["layers"] if row["layer"] == layer]
        lines.append(
            Row(
                layer,
                texts(
                    _largest((row["max_abs"] for row in rows), "{:.1e}"),
                    _largest((row["relative"] for row in rows), "{:.1e}"),
                    _largest((row["rounding_units"] for row in rows), "{:.2f}"),
                    sum(row["nonfinite"] for row in rows),
                ),
                Mark.of(Verdict.all_of(Verdict(row["verdict"]) for row in rows)),
            )
        )
    first = parity["first_departure"]
    return Table(
        title="Parity, layer by layer",
        columns=["Layer", "Largest error", "Of the scale", "In rounding units", "Not finite"],
        rows=lines,
        about="Outputs of every layer against those of the reference in float64, in order of "
        f"execution. {f'The first to depart is {first}.' if first else 'No layer departs.'} Layers "
        "explain the verdict and do not change it.",
    )


def _largest(values: Iterable[float | None], form: str) -> str:
    """Return the largest value, "" of none; a document says null for one that is not finite."""
    found = list(values)
    if not found:
        return ""
    finite = [value for value in found if value is not None]
    return form.format(max(finite)) if len(finite) == len(found) else "not finite"
