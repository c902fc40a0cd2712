"""Rows and numbers of a document, in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from ccn_deploy.verdict import Verdict

Json = Mapping[str, Any]


def reason(document: Json) -> str:
    """Return the verdict's reason in one sentence."""
    judged = [document["clean"], *(row for row in document["attacks"] if "verdict" in row)]
    allowed = f"{100 * document['max_drop']:g}"
    if document["verdict"] == Verdict.PASS.value:
        worst = max(_worst_bound(row) for row in judged)
        return (
            f"In none of {len(judged)} comparisons on {document['samples']} images does "
            f"{target(document)} fall behind {document['reference']} by more than "
            f"{100 * worst:.2f} points, at 95 % confidence; {_points(allowed)} allowed."
        )
    names = {id(row): title(row) for row in judged}
    deciding = [row for row in judged if row["verdict"] == document["verdict"]]
    more = len(deciding) - 1
    also = f"; likewise in {more} more {'row' if more == 1 else 'rows'}" if more else ""
    return f"{names[id(deciding[0])]}: {deciding[0]['reason']}{also}."


def _worst_bound(row: Json) -> float:
    gates = [row, *row.get("gates", {}).values()]
    return float(max(gate["drop_upper95"] for gate in gates))


def _points(allowed: str) -> str:
    return f"{allowed} is" if allowed == "1" else f"{allowed} are"


def title(row: Json) -> str:
    """Return what a row is about, for people."""
    if "attack" not in row:
        return "Without an attack"
    name = row["title"]
    if row["epsilon"] is not None:
        return f"{name}, ε = {row['epsilon']:g}"
    return str(name) if row["clip"] else f"{name}, not clipped to [0, 1]"


def target(document: Json) -> str:
    """Return runtime and precision, as tables have them."""
    return f"{document['runtime']}-{document['precision']}"


def norm(name: str) -> str:
    """Return a norm as mathematics writes it."""
    return {"linf": "L∞ norm", "l2": "L2 norm"}.get(name, name)


def percent(share: float) -> str:
    """Return a share in percent."""
    return f"{100 * share:.1f}\N{NO-BREAK SPACE}%"


def interval(ci95: Sequence[float]) -> str:
    """Return an interval of shares, in percent."""
    return f"{100 * ci95[0]:.1f} to {100 * ci95[1]:.1f}"


def number(value: float | None) -> str:
    """Return a number of about 1, or that there is none."""
    return "none" if value is None else f"{value:.3f}"
